"""``closeout policies``."""

from typing import Annotated

import typer

from consumer.cli.options import Examples, Json, PolicyFile, Tenant

app = typer.Typer(help="Rules on completed runs, written in CEL.", no_args_is_help=True)


@app.command()
def apply(file: PolicyFile, *, as_json: Json = False) -> None:
    """Apply the policies in FILE: all of them, or none if one is invalid.

    A changed policy becomes a new version; the old version is kept. Workers load
    it within five seconds.

    FILE is a list of {name, effect: flag | suppress_incident, severity,
    condition, tenant_id?, mode?, enabled?}. A condition is CEL on run, for
    example: run.status == "failed" && run.usage.cost_usd > 5.0

    With mode: shadow a policy is evaluated on every run and counted, and has no
    effect; the enforced version stays in force. closeout policies shadow shows
    its results. Applied without mode: shadow, it is enforced.

    Example: closeout policies apply policies.yaml
    """
    from consumer.commands.policies.apply import apply_file

    apply_file(file, as_json=as_json)


@app.command("list")
def list_(
    *,
    tenant: Annotated[
        str | None, typer.Option(metavar="TENANT", help="Only policies that apply to this tenant.")
    ] = None,
    all_versions: Annotated[bool, typer.Option("--all-versions", metavar="", help="Include old versions.")] = False,
    as_json: Json = False,
) -> None:
    """List the policies, those for all tenants first, and whether each is enforced, in shadow, or off.

    Example: closeout policies list --tenant acme --all-versions
    """
    from consumer.commands.policies.apply import print_policies

    print_policies(tenant=tenant, all_versions=all_versions, as_json=as_json)


@app.command("test")
def dry_run(
    file: PolicyFile,
    *,
    run: Annotated[
        str,
        typer.Option(
            metavar="RUN",
            help="A run-completed message in a file of JSON, - for standard input; or a stored TENANT/RUN_ID.",
        ),
    ],
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Exit 1 unless this policy's condition holds; may be repeated."),
    ] = None,
    expect_not: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Exit 1 if this policy's condition holds; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate the policies in FILE on one run, as if they alone were applied; show which hold, and why.

    Changes nothing, and needs a server only for a stored run. For each condition
    it shows the clauses joined by && and || with their results, and the values
    that were read. Exit 0 whether or not conditions hold, unless --expect or
    --expect-not is given: for tests of policies in CI. NAME may be TENANT/NAME if
    two policies have the same name.

    Example: closeout policies test policies.yaml --run run.json --expect costly
    """
    from consumer.commands.policies.dry_run import test_file

    test_file(file, run=run, expect=expect or (), expect_not=expect_not or (), as_json=as_json)


@app.command()
def backtest(
    file: PolicyFile,
    *,
    since: Annotated[str, typer.Option(metavar="TIME", help="Only runs received within the last 2h, 30d.")] = "30d",
    tenant: Tenant = None,
    sample: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only N random runs: a first answer.")] = None,
    limit_examples: Examples = 3,
    as_json: Json = False,
) -> None:
    """Evaluate the policies in FILE on stored runs: what each would have flagged or suppressed, by tenant.

    The results are compared with the enforced policies: newly are runs that no
    policy of this name flagged or suppressed, no longer are runs that one did.
    Reads only, in short transactions next to live workers, in one process per
    core; a role with SELECT is enough. With --sample each share has its interval
    of confidence. Some fields are not stored: the error message if the incident
    was suppressed, steps and trace id of a run without a trace. A run whose
    result depends on one of them counts as unknown.

    Example: closeout policies backtest policies.yaml --since 30d --tenant acme
    """
    from consumer.commands.policies.backtest import backtest_file

    backtest_file(file, since=since, tenant=tenant, limit_examples=limit_examples, sample=sample, as_json=as_json)


@app.command()
def shadow(*, tenant: Tenant = None, limit_examples: Examples = 3, as_json: Json = False) -> None:
    """Show the results of each shadow policy since it was applied, by tenant, with examples.

    The results are compared with those of the enforced version on the same runs.
    To enforce a shadow policy, apply it without mode: shadow. To end it, apply it
    with enabled: false. Reads only.

    Example: closeout policies shadow --tenant acme
    """
    from consumer.commands.policies.shadow import print_shadow

    print_shadow(tenant=tenant, limit_examples=limit_examples, as_json=as_json)

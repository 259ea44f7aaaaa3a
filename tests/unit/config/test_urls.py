"""The TLS files that the URLs name are checked at startup, and an error names the parameter."""

from pathlib import Path

import pytest
import trustme

from config.settings import Settings, SettingsError, load_settings

DATABASE, AMQP = "postgresql://u:hunter2@db.example/d", "amqps://u:hunter3@mq.example/v"

NO_IDENTITY = "cannot be used; expected a certificate and its key, in PEM and without password"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of an authority, an identity and its key, another key, and a file that is none of them."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca"))
    own, other = (authority.issue_cert("worker.example") for _ in range(2))
    own.cert_chain_pems[0].write_to_path(str(folder / "cert"))
    own.private_key_pem.write_to_path(str(folder / "key"))
    own.private_key_and_cert_chain_pem.write_to_path(str(folder / "both"))
    other.private_key_pem.write_to_path(str(folder / "other-key"))
    (folder / "text").write_text("no certificate")
    (folder / "folder").mkdir()
    return folder


def load(database: str = "", amqp: str = "", scheme: str = "amqps") -> Settings:
    urls = {"DATABASE_URL": f"{DATABASE}?{database}", "AMQP_URL": f"{scheme}{AMQP[5:]}?{amqp}"}
    return load_settings({name: url.rstrip("?") for name, url in urls.items()})


def fault(database: str, amqp: str = "", scheme: str = "amqps") -> str:
    with pytest.raises(SettingsError) as caught:
        load(database, amqp, scheme)
    assert "hunter" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "parameters",
    [
        "sslmode=verify-full&sslrootcert={0}/ca",
        "sslmode=verify-full&sslrootcert=system",
        "sslmode=verify-ca&sslrootcert={0}/ca&sslcert={0}/cert&sslkey={0}/key",
        "sslmode=verify-ca&sslrootcert={0}/ca&sslcert={0}/both",
        "sslmode=disable",
        "sslmode=require&application_name=x",
    ],
)
def test_parameters_of_libpq_are_accepted(files, parameters):
    url = f"{DATABASE}?{parameters.format(files)}"
    settings = load_settings({"DATABASE_URL": url}, need_amqp=False)
    assert settings.database_url.get_secret_value() == settings.database_url_now() == url
    assert settings.warnings == ()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (
            "sslmode=verify_full",
            "sslmode=verify_full expected disable, allow, prefer, require, verify-ca or verify-full",
        ),
        ("sslrootcert={0}/none", "sslrootcert={0}/none cannot be read: No such file or directory"),
        ("sslrootcert={0}/folder", "sslrootcert={0}/folder cannot be read: Is a directory"),
        ("sslrootcert={0}/text", "sslrootcert={0}/text contains no PEM certificate"),
        ("sslcrl={0}/none", "sslcrl={0}/none cannot be read: No such file or directory"),
        ("sslcert={0}/cert&sslkey={0}/none", "sslkey={0}/none cannot be read: No such file or directory"),
        (
            "sslcert={0}/cert&sslkey={0}/other-key",
            "sslcert={0}/cert and sslkey={0}/other-key do not match",
        ),
        (
            "sslcert={0}/cert",
            f"sslcert={{0}}/cert and sslkey={{0}}/cert {NO_IDENTITY}",
        ),
        ("sslkey={0}/key", "sslkey is given without sslcert"),
        (
            "sslmode=require&sslrootcert=system",
            "sslrootcert=system needs sslmode=verify-full, because anyone can get such a certificate",
        ),
        (
            "sslmode=verify-ca",
            "sslmode=verify-ca needs sslrootcert=FILE with the signing authority, or sslrootcert=system",
        ),
    ],
)
def test_an_invalid_postgresql_parameter_is_named(files, parameters, words, monkeypatch):
    monkeypatch.setenv("HOME", str(files))  # where libpq's root.crt would be
    monkeypatch.delenv("PGSSLROOTCERT", raising=False)
    assert fault(parameters.format(files)) == f"DATABASE_URL: {words.format(files)}"


def test_the_default_files_of_libpq_for_authority_and_key_are_used(files, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".postgresql").mkdir()
    (tmp_path / ".postgresql/root.crt").write_bytes((files / "ca").read_bytes())
    (tmp_path / ".postgresql/postgresql.key").write_bytes((files / "key").read_bytes())
    assert load(f"sslmode=verify-full&sslcert={files}/cert").warnings == ()


@pytest.mark.parametrize("mode", ["", "&sslmode=prefer", "&sslmode=disable"])
def test_an_authority_without_effect_is_a_warning(files, mode):
    (reported,) = load(f"sslrootcert={files}/ca{mode}").warnings
    assert reported.startswith("DATABASE_URL: sslrootcert has no effect with sslmode=")
    assert reported.endswith("use sslmode=verify-full")


@pytest.mark.parametrize(
    "parameters",
    ["", "cafile={0}/ca", "capath={0}/folder", "cafile={0}/ca&certfile={0}/cert&keyfile={0}/key", "no_verify_ssl=0"],
)
def test_parameters_of_the_amqp_client_are_accepted(files, parameters):
    settings = load(amqp=parameters.format(files))
    assert settings.amqp_url_now() == settings.amqp_url.get_secret_value()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ("cafile={0}/none", "cafile={0}/none cannot be read: No such file or directory"),
        ("cafile={0}/text", "cafile={0}/text contains no PEM certificate"),
        ("capath={0}/ca", "capath={0}/ca is not a folder"),
        ("cadata=AAAA", "cadata contains no certificate; expected DER in base64"),
        ("cacertfile={0}/ca", "cacertfile is an unknown parameter; use cafile"),
        (
            "certfile={0}/cert&keyfile={0}/other-key",
            "certfile={0}/cert and keyfile={0}/other-key do not match",
        ),
        ("keyfile={0}/key", "keyfile is given without certfile"),
        *(
            (
                f"no_verify_ssl={value}",
                "no_verify_ssl disables certificate verification and is not allowed; set cafile=CA",
            )
            for value in ("1", "true", "false", "no")  # the client treats each of them as true
        ),
    ],
)
def test_an_invalid_rabbitmq_parameter_is_named(files, parameters, words):
    assert fault("", parameters.format(files)) == f"AMQP_URL: {words.format(files)}"


@pytest.mark.parametrize("name", ["cafile", "certfile", "no_verify_ssl"])
def test_tls_parameters_on_a_url_without_tls_are_refused(files, name):
    words = fault("", f"{name}={files}/ca", scheme="amqp")
    assert words == f"AMQP_URL: {name} is for TLS, but amqp:// is without TLS; use amqps://"


def test_an_invalid_query_is_refused(files):
    assert fault("sslmode").startswith("DATABASE_URL: found a secret value; expected postgresql://")


def test_an_encrypted_key_without_password_does_not_prompt_on_the_terminal(files, tmp_path):
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key((files / "key").read_bytes(), None)
    encrypted = tmp_path / "key"
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"open"),
        )
    )
    assert "without password" in fault("", f"certfile={files}/cert&keyfile={encrypted}")
    assert load(f"sslcert={files}/cert&sslkey={encrypted}&sslpassword=open").warnings == ()
    assert "with that password" in fault(f"sslcert={files}/cert&sslkey={encrypted}&sslpassword=shut")

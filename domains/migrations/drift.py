"""Describes how a database's schema differs from this version's tables, with the SQL that fixes each difference."""

from collections.abc import Iterator, Sequence
from io import StringIO

from alembic.autogenerate import produce_migrations
from alembic.migration import MigrationContext
from alembic.operations import MigrateOperation, Operations, ops
from sqlalchemy import MetaData
from sqlalchemy.dialects import postgresql

_DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]


def differences_in(context: MigrationContext, metadata: MetaData) -> list[str]:
    """Return a line for each difference: what is missing, unexpected or different, and the SQL that fixes it.

    Covers what Alembic compares: tables, columns, indexes, unique and foreign keys, defaults and comments. It compares
    no primary key, no check constraint, no storage parameter and not the WHERE of an index.
    """
    found = produce_migrations(context, metadata).upgrade_ops
    lines = [] if found is None else [_line(together) for together in _grouped(list(_leaves(found.ops)))]
    # Alembic's order is random. Tables come first, because their indexes depend on them.
    return sorted(lines, key=lambda line: (not line.startswith("table "), line))


def _leaves(found: Sequence[MigrateOperation]) -> Iterator[MigrateOperation]:
    for operation in found:
        if isinstance(operation, ops.ModifyTableOps):
            yield from _leaves(operation.ops)
        else:
            yield operation


def _grouped(found: list[MigrateOperation]) -> list[list[MigrateOperation]]:
    """Pair a dropped index with the one of the same name that replaces it."""
    groups: dict[object, list[MigrateOperation]] = {}
    for operation in found:
        name = operation.index_name if isinstance(operation, ops.CreateIndexOp | ops.DropIndexOp) else operation
        groups.setdefault(name, []).append(operation)
    return list(groups.values())


def _line(together: list[MigrateOperation]) -> str:
    description, remedy = f"{_named(together[-1])} is different", "to fix it"
    match together:
        case [ops.CreateTableOp() | ops.AddColumnOp()]:
            description = f"{_named(together[0])} is missing, with its data"
        case [ops.CreateIndexOp() | ops.AddConstraintOp()]:
            description = f"{_named(together[0])} is missing"
        case [ops.DropTableOp() | ops.DropColumnOp() | ops.DropIndexOp() | ops.DropConstraintOp()]:
            # It may be intended, and dropping a column or a table drops its data.
            description, remedy = f"{_named(together[0])} is unexpected", "unless it is intended"
        case [ops.AlterColumnOp() as changed]:
            description += f": {', '.join(_changes(changed))}"
    return f"{description}; {remedy}: {' '.join(map(_sql, together))}"


def _named(operation: MigrateOperation) -> str:
    match operation:
        case ops.CreateTableOp(table_name=table) | ops.DropTableOp(table_name=table):
            return f"table {table}"
        case ops.AddColumnOp(table_name=table, column=column):
            return f"column {table}.{column.name}"
        case (
            ops.DropColumnOp(table_name=table, column_name=name) | ops.AlterColumnOp(table_name=table, column_name=name)
        ):
            return f"column {table}.{name}"
        case ops.CreateIndexOp(table_name=table, index_name=name) | ops.DropIndexOp(table_name=table, index_name=name):
            return f"index {name} on {table}"
        case ops.AddConstraintOp() | ops.DropConstraintOp():
            constraint = operation.to_constraint()
            return f"constraint {constraint.name} of {constraint.table.name}"
    table = getattr(operation, "table_name", "one")
    return f"the comment on table {table}"


def _changes(operation: ops.AlterColumnOp) -> Iterator[str]:
    if operation.modify_type is not None:
        found, right = (
            kind.compile(_DIALECT) if kind is not None else "unknown"
            for kind in (operation.existing_type, operation.modify_type)
        )
        yield f"its type is {found}, not {right}"
    if operation.modify_nullable is not None:
        yield "it is NOT NULL" if operation.modify_nullable else "it is nullable"
    if operation.modify_server_default is not False:
        yield "its default differs" if operation.modify_server_default is not None else "it has a default"
    if operation.modify_comment is not False:
        yield "its comment"


def _sql(operation: MigrateOperation) -> str:
    """Return the statement of *operation* on one line; an index is built concurrently."""
    if isinstance(operation, ops.CreateIndexOp | ops.DropIndexOp):
        operation.kw["postgresql_concurrently"] = True
    written = StringIO()
    offline = MigrationContext.configure(
        dialect_name="postgresql", opts={"as_sql": True, "output_buffer": written, "literal_binds": True}
    )
    Operations(offline).invoke(operation)
    return " ".join(written.getvalue().split())

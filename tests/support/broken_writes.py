"""Helpers that read tables, and make the database refuse writes to one."""

from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from domains import tables


async def count(engine: AsyncEngine, table: str) -> int:
    async with engine.connect() as conn:
        return int((await conn.execute(select(func.count()).select_from(getattr(tables, table)))).scalar_one())


async def only_row(engine: AsyncEngine, table: str) -> dict[str, Any]:
    async with engine.connect() as conn:
        return dict((await conn.execute(select(getattr(tables, table)))).mappings().one())


async def break_writes_to(engine: AsyncEngine, table: str, message: str = "injected") -> None:
    """Make the database refuse every insert into *table*."""
    async with engine.begin() as conn:
        await conn.execute(
            text(
                f"CREATE FUNCTION governance.refuse() RETURNS trigger LANGUAGE plpgsql AS "
                f"$$ BEGIN RAISE EXCEPTION '{message}'; END $$"
            )
        )
        await conn.execute(
            text(
                f"CREATE TRIGGER refuse BEFORE INSERT ON governance.{table} FOR EACH ROW "
                "EXECUTE FUNCTION governance.refuse()"
            )
        )


async def repair_writes(engine: AsyncEngine) -> None:
    async with engine.begin() as conn:
        await conn.execute(text("DROP FUNCTION governance.refuse CASCADE"))

"""The same client under asyncio."""

import asyncio

from sandstorm import AsyncSandstorm


async def main() -> None:
    async with AsyncSandstorm() as sandstorm:
        result = await sandstorm.run("print('hello from asyncio')", language="python")
        print(result.text, end="")


asyncio.run(main())

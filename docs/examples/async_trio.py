"""The same client under trio."""

import trio

from sandstorm import AsyncSandstorm


async def main() -> None:
    async with AsyncSandstorm() as sandstorm:
        result = await sandstorm.run("print('hello from trio')", language="python")
        print(result.text, end="")


trio.run(main)

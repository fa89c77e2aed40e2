"""Public uses as types see them: type-checked by `make check`, never run."""

from collections.abc import Sequence
from decimal import Decimal

from sandstorm import AsyncSandstorm, Constraints, Plan, RunResult, SandboxSpec, Sandstorm, Task
from sandstorm.policy import Candidate, Exclusion, Knowledge, Ranked, Request, hookimpl
from sandstorm.provider import Declined, Facts, Offer, Provider
from sandstorm.provider import SandboxSpec as ProviderSpec
from sandstorm.testing import ReferenceProvider


def blocking() -> None:
    """Blocking code."""
    with Sandstorm(settings={"strategy": "fastest"}) as sandstorm:
        result: RunResult = sandstorm.run("print(1)", "python", constraints=Constraints(max_cost="0.10", only=["local"]))
        cost: Decimal | None = result.cost
        plan: Plan = sandstorm.plan(task=Task(argv=["true"]), spec=SandboxSpec(memory=256, network="none"))
        for task, outcome in sandstorm.map([Task(code="1", language="python")]):
            code: str | None = task.code
            print(code, cost, plan.reasons, outcome if isinstance(outcome, Exception) else outcome.exit.code)
        with sandstorm.sandbox() as box, box.exec("cat", stdin=b"x") as running:
            sizes: list[int] = [len(output.data) for output in running]
            print(sizes, running.exit)


async def asynchronous() -> None:
    """Async code."""
    async with AsyncSandstorm() as sandstorm, sandstorm.sandbox() as box:
        data: bytes = await box.download("x")
        async with box.exec("cat", stdin=data) as running:
            async for output in running:
                print(output.stream, output.offset)


class Policy:
    """A policy."""

    @hookimpl
    def sandstorm_screen(self, request: Request, candidate: Candidate) -> Exclusion | None:
        """Rules out what is spot."""
        return Exclusion("no-spot", f"{request.tenant} wants none") if candidate.offer.spot else None


class Last:
    """A strategy."""

    name = "last"

    def rank(self, request: Request, candidates: Sequence[Candidate], knowledge: Knowledge) -> Sequence[Ranked]:
        """The last first."""
        return [
            Ranked(candidate, f"known {knowledge.of(candidate.provider, 'default', None).starts}") for candidate in candidates
        ]


def offers(provider: Provider, spec: ProviderSpec) -> list[Offer | Declined]:
    """What a provider offers."""
    return list(provider.offers(spec, Facts()))


reference: Provider = ReferenceProvider()

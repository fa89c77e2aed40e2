"""Runs code where it may run, and shows what was decided."""

from sandstorm import Constraints, Sandstorm

with Sandstorm() as sandstorm:
    result = sandstorm.run("print('hello')", language="python", constraints=Constraints(max_cost="0.10", max_latency=5))
    print(result.stdout, result.exit.code, result.provider, result.cost)
    for reason in result.plan.reasons:
        print(reason)

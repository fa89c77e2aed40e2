"""Runs many programs at once; results come as they finish."""

from sandstorm import RunResult, Sandstorm, Task

tasks = [Task(code=f"print({n} ** 2)", language="python", effects="none") for n in range(5)]
with Sandstorm() as sandstorm:
    for task, result in sandstorm.map(tasks, concurrency=2):
        if isinstance(result, RunResult):
            print(task.code, "gave", result.text.strip())
        else:
            print(task.code, "failed:", result)

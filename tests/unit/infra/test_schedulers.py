"""What infra/README.md tells schedulers: commands that Convoy takes, and operators as Airflow documents them."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator

import pytest
from typer.main import get_command

from convoy.cli.main import app
from infra_files import INFRA

README = (INFRA / "README.md").read_text(encoding="utf-8")
# From the references of both operators (providers standard 1.x and google 22.2) and of Airflow's BaseOperator.
BASE = {"task_id", "retries", "retry_delay", "execution_timeout", "trigger_rule", "pool", "owner", "dag"}
OPERATORS = {
    "airflow.providers.standard.operators.bash.BashOperator": (
        {"task_id", "bash_command"},
        {"bash_command", "env", "append_env", "output_encoding", "skip_on_exit_code", "cwd"},
    ),
    "airflow.providers.google.cloud.operators.ray.RaySubmitJobOperator": (
        {"task_id", "cluster_address", "entrypoint"},
        {
            "cluster_address",
            "entrypoint",
            "get_job_logs",
            "wait_for_job_done",
            "runtime_env",
            "metadata",
            "submission_id",
            "entrypoint_num_cpus",
            "entrypoint_num_gpus",
            "entrypoint_memory",
            "entrypoint_resources",
            "submit_job_timeout",
            "gcp_conn_id",
            "impersonation_chain",
        },
    ),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def operators() -> Iterator[tuple[str, dict[str, ast.expr]]]:
    """Each operator of the page by its full name, with what it is given."""
    for block in blocks("python"):
        tree = ast.parse(block)
        modules = {
            alias.name: node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                given = {keyword.arg or "": keyword.value for keyword in node.keywords}
                yield f"{modules[node.func.id]}.{node.func.id}", given


def parses(words: list[str]) -> bool:
    """Whether a command line is one of Convoy's: an unknown command or option raises."""
    command, rest = get_command(app), words
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    with command.make_context(words[0], list(rest)):
        return True


def test_both_operators_are_there_with_parameters_that_they_have() -> None:
    found = list(operators())
    assert [name for name, _ in found] == list(OPERATORS)
    for name, given in found:
        required, known = OPERATORS[name]
        assert required <= set(given) <= known | BASE


def test_the_commands_of_the_operators_are_commands_of_ours() -> None:
    values = {name: ast.literal_eval(value) for _, given in operators() for name, value in given.items()}
    submit = shlex.split(values["bash_command"])
    assert submit[:3] == ["convoy", "submit", "score"]
    assert parses(submit[1:])
    entrypoint = shlex.split(values["entrypoint"])
    assert entrypoint[:3] == ["python", "-m", "convoy.cli"]
    assert parses(entrypoint[3:])
    assert values["env"]["RAY_AUTH_MODE"] == "token"
    # Both templates make the day part of what may happen once.
    assert "{{ ds }}" in submit
    assert "{{ ds }}" in values["submission_id"]


def test_a_command_that_is_not_ours_would_be_found() -> None:
    with pytest.raises(Exception, match="no-such-option"):
        parses(["submit", "score", "--no-such-option"])
    with pytest.raises(KeyError):
        parses(["submit", "nothing"])


def test_the_line_for_cron_is_that_of_the_crontab() -> None:
    (line,) = [line for block in blocks("") for line in block.splitlines() if "* * *" in line]
    crontab = (INFRA / "cron" / "crontab").read_text(encoding="utf-8")
    assert any(one.startswith(line) for one in crontab.splitlines())

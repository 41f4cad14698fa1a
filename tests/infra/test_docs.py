"""What README and docs name is there: commands and their options, modules, paths, links, keys of configurations."""

import importlib.util
import re
from pathlib import Path

import pytest
import typer
import yaml

from unlearn import config
from unlearn.cli.app import app
from unlearn.search.compare import Compare
from unlearn.search.space import Sweep

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md", *sorted((ROOT / "infra/docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "jobs/configs").glob("*.yaml"))
COMMAND = typer.main.get_command(app)
SWEEP = (Sweep.model_fields.keys() | Compare.model_fields.keys()) - {"run"}  # keys of such files themselves

pages = pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=lambda path: path.name)


def code(page: Path) -> str:
    """What stands in code: fences and backquotes of a page; the comments of a configuration."""
    text = page.read_text()
    if page.suffix == ".yaml":
        return "\n".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#")).replace("\\\n", " ")
    fences = re.findall(r"```\w*\n(.*?)```", text, re.S) + re.findall(r"^    .*$", text, re.M)
    rest = re.sub(r"```.*?```", "", text, flags=re.S)
    return "\n".join([*fences, *re.findall(r"`([^`\n]+)`", rest)]).replace("\\\n", " ")


def commands(text: str) -> list[list[str]]:
    """The words of every `unlearn ...` in a text, up to the end of its line or a comment."""
    lines = re.findall(r"^(?:bash |\S+/)?unlearn ([a-z].*)$", text, re.M)
    return [line.partition(" #")[0].partition(";")[0].split() for line in lines]


def unknown(words: list[str]) -> str | None:
    """What of a command line the program does not know."""
    command, words = COMMAND, list(words)
    while words and hasattr(command, "commands") and command.commands:
        name = words.pop(0).rstrip(",")
        if name not in command.commands and hasattr(command, "default"):  # unlearn sweep SWEEP.yaml
            name = command.default
        if name not in command.commands:
            return name
        command = command.commands[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    return next((option for option in options if option not in known), None)


@pages
def test_commands_are_known(page):
    wrong = [(" ".join(words), unknown(words)) for words in commands(code(page)) if unknown(words)]
    assert not wrong


def test_a_command_that_is_not_there_is_found():
    assert (
        unknown(["forget", "x"]) == "forget"
        and unknown(["run", "x", "--sets", "a=b"]) == "--sets"
        and unknown(["jobs", "kill"]) == "kill"
    )
    assert unknown(["run", "x", "--set", "a=b"]) is None


@pages
def test_paths_and_modules_are_there(page):
    text = code(page)
    paths = re.findall(r"(?<![\w/:.])((?:infra|jobs|unlearn|tests|pipelines|\.github)/[\w./-]*\w)", text)
    modules = re.findall(r"python -m ((?:jobs|unlearn)[\w.]*)", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pages
def test_keys_of_overrides_are_known(page):
    """`--set a.b=value` of a page names a key that there is; options of a model's family are its own."""
    tree = config.json_schema()

    def known(key: str) -> bool:
        part, *rest = key.split(".")
        node = tree["properties"].get(part)
        for name in rest:
            parts = [
                tree["$defs"][p["$ref"].rpartition("/")[2]] if "$ref" in p else p
                for p in (node or {}).get("oneOf", [node])
            ]
            parts = [
                tree["$defs"][ref["$ref"].rpartition("/")[2]] if "$ref" in ref else ref
                for p in parts
                for ref in p.get("anyOf", [p])
            ]
            node = next((p["properties"][name] for p in parts if name in p.get("properties", {})), None)
            if node is None:
                return part == "model" and rest[0] == "options"
        return node is not None

    keys = re.findall(r"(?:--set|-s) ([a-z_.]+)=", code(page))
    assert [key for key in keys if key.partition(".")[0] not in SWEEP and not known(key.removeprefix("run."))] == []
    assert known("method.alpha") and known("training.lr") and not known("training.speed") and not known("speed")


def test_the_readmes_configuration_is_valid():
    text = next(block for block in re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
    assert config.parse(yaml.safe_load(text)).name == "forget-a-hundred"


def test_the_readmes_tree_is_true():
    tree = re.search(r"## The tree\n\n(.*?)\n\n##", (ROOT / "README.md").read_text(), re.S)[1]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    there = {
        path.name for path in ROOT.iterdir() if not path.name.startswith(".") and path.name not in ("runs", "shared")
    }
    assert named == {name for name in there if not name.endswith(".egg-info")} - {"README.md", "LICENSE"}

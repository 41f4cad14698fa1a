"""What a report tells in words: what was asked, what was done, what an audit found, how to do it again, what is not
claimed."""

import json
import shlex
from typing import Any

from unlearn.data import selection
from unlearn.data.storage import Storage
from unlearn.run import Run

AUDIT = "audit.json"
NOT_CLAIMED = (
    "That nothing of the forgotten images can be got out of the model: these are measurements, not proof.",
    "That the model equals one that was trained without these images, even where its figures do.",
    "That the images are gone from data sets, backups, or from models and copies that were handed out before.",
    "Anything on images, views or classes that are not named here.",
)
# How the forget set may be chosen, in the words of a sentence.
_CHOSEN = {
    "classes": "whole classes",
    "exclude_classes": "all but some classes",
    "ids": "single images",
    "ids_from": "single images of a list",
    "subjects": "persons or other subjects",
}


def asked(run: Run) -> list[str]:
    """What was to be forgotten and what was to stay, in counts and classes: no id and no subject."""
    sets, rows = selection.describe(run.sets), run.settings.data.forget
    if "forget" not in sets or rows is None:
        return ["Nothing: this run has no forget set."]
    how = [words for key, words in _CHOSEN.items() if getattr(rows, key) is not None]
    by = f"chosen as {' and '.join(how)}" if how else "chosen from all"
    forget, retain = sets["forget"], sets["retain"]
    stay = "Images in the retain role, which is played by a proxy set" if run.settings.data.proxy else "Images to keep"
    return [
        f"To be forgotten: {forget['images']:,} training images of {_classes(forget['classes'])}, {by}.",
        f"{stay}: {retain['images']:,} of {_classes(retain['classes'])}.",
    ]


def done(run: Run, document: dict[str, Any]) -> list[str]:
    """What was made of the original model."""
    if "unlearned" not in document["generators"]:
        return ["Nothing has been trained yet."]
    settings, training = run.settings, run.settings.training
    sentences = [
        f"A {settings.model.family} model was trained further with the method {settings.method.name}: {run.steps:,} "
        f"steps of {training.batch_size} images, with seed {settings.seed}."
    ]
    if "oracle" in document["generators"]:
        count = len(settings.evaluation.oracles)
        told = "A model" if count == 1 else f"{count} models"
        sentences.append(
            f"{told} trained without the forget set stand{'s' if count == 1 else ''} beside it, as the oracle: the "
            "aim of forgetting."
        )
    else:
        sentences.append(
            "There is no oracle, a model trained without the forget set: how far forgetting should go is not known."
        )
    return sentences


def commands(run: Run) -> list[str]:
    """What a shell is told to do it again, and to audit it."""
    folder = Storage(run.folder)
    again = [f"unlearn run {shlex.quote(folder.where('config.yaml'))} --set run_dir=ANOTHER_FOLDER"]
    for command in ("evaluate", "audit", "report"):
        again.append(f"unlearn {command} {shlex.quote(run.folder)}")
    return again


def audit(run: Run, document: dict[str, Any]) -> dict[str, Any]:
    """{"verdict", "sentence", "tests": [{"title", "verdict", "shows", "reasons"}]} of the audit of these very
    weights."""
    storage, weights = Storage(run.folder), document["weights"].get("unlearned")
    command = f"`unlearn audit {run.folder}`"
    if weights is None:
        return {"verdict": None, "sentence": "There is no unlearned model to audit.", "tests": []}
    if not storage.is_file(AUDIT):
        return {
            "verdict": None,
            "sentence": f"Not audited: whether traces remain inside the model is not known. {command} asks.",
            "tests": [],
        }
    try:
        found = json.loads(storage.read(AUDIT))
        if found["weights"]["unlearned"] != weights:
            return {
                "verdict": None,
                "sentence": f"The audit beside this report is of other weights: {command} audits these.",
                "tests": [],
            }
        tests = [{key: found[name][key] for key in ("title", "verdict", "shows", "reasons")} for name in found["tests"]]
        verdict = found["verdict"]
    except (ValueError, KeyError, TypeError):
        return {"verdict": None, "sentence": f"{AUDIT} is damaged: {command} writes it anew.", "tests": []}
    return {"verdict": verdict, "sentence": _SENTENCES.get(verdict, ""), "tests": tests}


_SENTENCES = {
    "PASS": "No test of the audit found traces, and at least one of them would have.",
    "FAIL": "At least one test of the audit found that the model gives away what it was to forget.",
    "NOT SHOWN": "The audit decides nothing: no test failed, and none that could have shown traces is decided.",
}


def _classes(names: list[str]) -> str:
    if not names:
        return "no known class"
    few = ", ".join(names[:6])
    return f"{len(names)} class{'es' if len(names) > 1 else ''} ({few}{', ...' if len(names) > 6 else ''})"

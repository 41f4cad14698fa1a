"""What the figures of an evaluation say, in plain words."""

import math

from unlearn.evaluation import oracles


def verdict(document: dict) -> tuple[str, list[str]]:
    """(headline, sentences) in plain words, from the figures under the first view.

    A change of the mean cosine counts where it is larger than twice its standard error, taken as for independent
    samples.
    """
    rows = {(row["generator"], row["set"]): row for row in document["rows"] if row["view"] == document["views"][0]}
    if "unlearned" not in document["generators"]:
        return "Nothing has been unlearned yet.", ["The figures are those of the model as it is."]
    if ("original", "forget") not in rows:
        told = "The run has no original model or no forget set: the figures stand for themselves."
        return "There is nothing to compare.", [told]
    forget, retain = _change(rows, "forget"), _change(rows, "retain")
    if not forget["fell"]:
        headline = "No forgetting can be seen."
    elif not retain["fell"]:
        headline = "The forget set is reconstructed worse than before, the retain set as well as before."
    elif forget["by"] > retain["by"]:
        headline = (
            f"Forgotten at a price: the forget set lost {forget['by'] / retain['by']:.1f} times what the "
            "retain set lost."
        )
    else:
        headline = "Not selective: the retain set lost at least as much as the forget set."
    sentences = [_told("forget", forget), _told("retain", retain)]
    if ("oracle", "forget") in rows:
        sentences.append(_against_oracle(rows))
    if "oracle_distance" in document:
        sentences.append(oracles.told(document["oracle_distance"]))
    return headline, sentences


def _change(rows: dict, name: str) -> dict:
    before, after = rows["original", name], rows["unlearned", name]
    noise = math.hypot(before["cosine_std"] / before["images"] ** 0.5, after["cosine_std"] / after["images"] ** 0.5)
    by = before["cosine"] - after["cosine"]
    return {"before": before, "after": after, "by": by, "fell": by > 2 * noise}


def _told(name: str, change: dict) -> str:
    before, after = change["before"], change["after"]
    return (
        f"On the {name} set the hole is filled in with a similarity to the original image (cosine) of "
        f"{after['cosine']:.3f}, before {before['cosine']:.3f}, and a PSNR of {after['psnr']:.1f} dB, before "
        f"{before['psnr']:.1f} dB."
    )


def _against_oracle(rows: dict) -> str:
    before, after, oracle = (rows[g, "forget"]["cosine"] for g in ("original", "unlearned", "oracle"))
    told = f"The oracle, a model trained without the forget set, has a cosine of {oracle:.3f} on it"
    if oracle >= before:
        return f"{told}: no lower than the original's, so it is no measure of forgetting here."
    share = (before - after) / (before - oracle)
    if share > 1:
        return (
            f"{told}: the unlearned model has gone further. Worse than the oracle is no better: it can give the "
            "set away."
        )
    return f"{told}: the unlearned model has come {max(share, 0):.0%} of the way to it."

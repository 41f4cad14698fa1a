"""What a release claims, and what it does not: sentences that its certificate holds."""

from unlearn.releases.gate import Verdict

# Evidence of forgetting is evidence; no certificate turns it into proof.
NOT_CLAIMED: tuple[str, ...] = (
    "that nothing of the forgotten images can be got out of the model: it is evidence, not proof",
    "that the model equals one that was trained without these images",
    (
        "that the list of requests is complete, or whose they are: only who holds the request and its salt can show a "
        "commitment to be theirs"
    ),
    "that the images are gone from data sets, backups, or models and copies that were handed out before",
    "that anybody else has measured the figures again, or that the publisher's clock is right",
)


def claimed(
    version: str, weights: str, config_hash: str, base: str | None, requests: int, audited: bool,
    verdict: Verdict | None,
    rewritten: tuple[str, str] | None = None,
) -> list[str]:  # fmt: skip
    """Sentences, each of which the files of the release bear out."""
    sentences = [f"The holder of the key has published these files, and no others, as {version}."]
    start = f"starting from the weights {base[:16]}" if base else "from nothing"
    sentences.append(f"The weights {weights[:16]} were trained under the configuration {config_hash[:16]}, {start}.")
    if requests:
        sentences.append(f"Its forget set was chosen to serve {requests} deletion request(s), listed by commitment.")
    sentences.append("The figures in metrics.json were measured on these weights.")
    if audited:
        sentences.append("The figures in audit.json were measured on these weights.")
    if verdict is not None:
        judged = sum(check.passed is not None for check in verdict.checks)
        sentences.append(f"The gate held {judged} limit(s) against the figures, and none failed.")
    if rewritten:
        sentences.append(
            f"The training data with the manifest {rewritten[0][:16]} was written anew without the rows that are "
            f"served, with the manifest {rewritten[1][:16]}."
        )
    return sentences


def not_claimed(requests: int, audited: bool, verdict: Verdict | None) -> list[str]:
    """What a reader might take for claimed."""
    sentences = list(NOT_CLAIMED)
    if not requests:
        sentences.append("that a deletion request is served: none is listed")
    if not audited:
        sentences.append("that the model withstands an audit: there is none with it")
    if verdict is None:
        sentences.append("that the figures are good enough: no gate judged them")
    elif skipped := sum(check.passed is None for check in verdict.checks):
        sentences.append(f"anything on {skipped} limit(s) of the gate that could not be judged")
    return sentences

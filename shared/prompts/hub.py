# SPDX-License-Identifier: Apache-2.0
"""Rows of a data set on a hub, by the library `datasets`, which keeps them on disk as Arrow."""

from collections.abc import Iterator
from typing import Any

import yaml

from shared.errors import EyrieError, RetryableError, UserError
from shared.prompts.tables import plain_rows

_BATCH_ROWS = 256
_ANSWER_WITHIN_S = 3.0
_REMEDY = "Correct the source, or download its files and give their path."


def rows(
    name: str, *, subset: str | None, split: str | None, revision: str | None, label: str
) -> Iterator[tuple[str, Any]]:
    """Every row of one split with its position; `split` None is `train`, or the only one.

    Raises:
        UserError: no such data set, subset, split or revision, no access, or files that do not fit.
        RetryableError: the hub does not answer.
    """
    import datasets
    import pyarrow as pa

    from shared.io.hub import HUB_ERRORS

    try:
        builder = datasets.load_dataset_builder(name, subset, revision=revision)
        splits = list(map(str, builder.info.splits or builder.config.data_files or ()))
        chosen = split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else "")
        if not chosen:
            raise UserError(
                f"{label}: {name} on the hub: expected one split, found {', '.join(splits)}.",
                code="prompts-split",
                remedy="Set the source's `split` to one of them.",
                facts={"splits": splits},
            )
        builder.download_and_prepare()
        data = builder.as_dataset(split=chosen).with_format("arrow")
        number = 0
        for table in data.iter(batch_size=_BATCH_ROWS):
            for row in plain_rows(table):
                number += 1
                yield f"row {number}", row
    except (
        *HUB_ERRORS,
        yaml.YAMLError,  # in the head of its README.md
        datasets.exceptions.DatasetsError,
        pa.ArrowException,
    ) as error:
        raise _refusal(error, f"{label}: could not read {name} from the hub") from error


def require_answer(name: str, revision: str | None, *, label: str) -> None:
    """Ask the hub for a data set once; `rows` asks again and again, for half a minute.

    Offline the cache is all there is, and nobody is asked.

    Raises:
        UserError: no such data set or revision, or no access.
        RetryableError: the hub does not answer.
    """
    from huggingface_hub import HfApi, constants

    from shared.io.hub import HUB_ERRORS

    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(name, revision=revision, timeout=_ANSWER_WITHIN_S)
    except HUB_ERRORS as error:
        where = f"{label}: {name} is no file or folder here, and the hub has not given it"
        raise _refusal(error, where) from error


def _refusal(error: Exception, where: str) -> EyrieError:
    """What `datasets` raised, as one of our own errors, with the whole chain's reason."""
    from huggingface_hub import constants

    from shared.io.hub import may_pass

    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        if not isinstance(cause, Exception) or cause in chain:
            break
        chain.append(cause)
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:600]
    if deeper := [each for each in chain[1:] if str(each) and str(each) not in reason]:
        reason += f" ({' '.join(str(deeper[-1]).split())[:300]})"
    facts = {"exception": type(error).__name__}
    if constants.HF_HUB_OFFLINE:
        return UserError(
            f"{where}: it is not in the cache, and HF_HUB_OFFLINE is set: {reason}.",
            code="hub-offline",
            remedy="Fill the cache where there is a network, or give the data set's files.",
            facts=facts,
        )
    if any(map(may_pass, chain)):
        return RetryableError(
            f"{where}: {reason}.",
            code="hub-unreachable",
            remedy="Run the same command again. Without a network, give the data set's files.",
            facts=facts,
        )
    is_denied = "gated" in reason or "authenticated" in reason or "cannot be accessed" in reason
    return UserError(
        f"{where}: {reason}.",
        code="hub-data-set",
        remedy=f"If it is private or gated, set HF_TOKEN. {_REMEDY}" if is_denied else _REMEDY,
        facts=facts,
    )

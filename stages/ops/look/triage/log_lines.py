# SPDX-License-Identifier: Apache-2.0
"""What each line of a log is: an exception, an error, a traceback's frame, a quiet record, or text.

In: the lines of a log that many programs wrote into. Out: the same lines without what loggers and
launchers put before them, each with its kind. Only exceptions, errors and text can be evidence: an
INFO record may quote a prompt, and a frame of a traceback quotes source code.
"""

import collections
import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

# What may stand before a line's own text, each followed by the next: the pod, the rank, the process.
_ORIGIN = re.compile(
    r"\d{4}-\d\d-\d\dT[\d:.]+Z (?:stdout|stderr) [FP] |(?:stdout|stderr) [FP] "  # a container's log
    r"|\[pod/[^\]]+\] |[\w./-]+ +\| "  # kubectl, compose
    r"|\s*\d+: (?=\S)"  # srun --label
    r"|\([^()]*\b(?:pid|ip)=[^()]*\) ?"  # vLLM, Ray
    r"|\[(?:rank|default)\d+\]:? ?"  # torch, torchrun
    r"|\s+[|+] (?=\s*\S)"  # an exception group
)
_LEVEL = (
    r"(?P<level>DEBUG|INFO|NOTICE|WARNING|WARN|ERROR|CRITICAL|FATAL|SEVERE"
    r"|Debug|Info|Warning|Error|debug|info|warning|error|fatal)"
)
_TIME = r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?(?:Z|[+-]\d\d:?\d\d)?"
_RECORDS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"{_TIME} (?P<level>[A-Z]+) (?P<stage>synth|dump|train|bench|ops|demo) ",  # ours
        rf"{_LEVEL} \d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)? \[[^\]]*\] ?",  # vLLM
        r"[\w.-]+:\d+:\d+ \[\d+\] NCCL (?P<level>INFO) ",  # its WARN is an error
        r"\[?(?P<letter>[DIWEF])\d{3,4} [\d:.]+ (?:\d+ )*(?P<where>[^\]]*)\] ?",  # glog, torch
        rf"\[{_LEVEL}\|[^\]]*\](?: {_TIME} >>)? ?",  # transformers
        rf"\[(?:{_TIME}|\d\d/\d\d/\d{{4}}-[\d:]+)\] \[(?:TRT-LLM\] \[)?(?:{_LEVEL}|(?P<letter>[DIWEF]))\] ?",
        rf"(?:\[?{_TIME}\]?)[ \-|:]*(?:[\w.]+[ \-|:]+)?\[?{_LEVEL}\]?[ \-|:\]]+",  # Python's usual ones
        r"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL)(?::[\w.]+:|: +)",  # uvicorn, logging.basicConfig
        rf"\[{_LEVEL}\]:? ",
        r"(?P<level>[Ww]arning): +",  # git, compilers
        rf"wandb: {_LEVEL} ",
        rf"(?:time=\S+ )?level={_LEVEL} ",
        rf"(?=\{{.*\"(?:level|severity)\": ?\"{_LEVEL}\")",
    )
)
# Where a program's own line begins, whatever a collector put before it.
_ANCHOR = re.compile(
    r"Traceback \(most recent call last\)|(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d"
    r"|\d{4}-\d\d-\d\dT[\d:]+Z (?:INFO|WARNING|ERROR) (?:synth|dump|train|bench|ops|demo) "
)
_MAX_PREFIX, _PREFIX_SHARE = 120, 0.3
_WRAPPED = ("log", "textPayload", "MESSAGE", "message")  # of a collector's JSON
_STAMP = re.compile(rf"^\[?{_TIME}\]? +")
_QUIET = {"DEBUG", "INFO", "NOTICE", "WARNING", "WARN", "D", "I", "W"}
_LOUD = {"ERROR", "CRITICAL", "FATAL", "SEVERE", "E", "F"}
_TRACEBACK = re.compile(r"\s*(?:Exception Group )?Traceback \(most recent call last\):?\s*$")
_FRAME = re.compile(r'\s*File "[^"]*", line \d+')
_CHAINED = re.compile(r"\s*(?:During handling of|The above exception was)\b")
_CODE = re.compile(r"\s+(?:raise|return|await|yield|assert|with|for|if|self\.)\b|\s*[~^]+\s*$")
# A server without levels logs its requests.
_REQUEST = re.compile(
    r"Receive(?:d request|: )|GenerateReqInput|\b(?:prompt|messages|text) ?[=:] ?['\"\[{]"
    r"|['\"](?:prompt|messages|role|content)['\"]: "
    # A conversation, printed; its rows may be numbered.
    r"|^\W*(?i:(?:(?:row|sample|turn|example) )?\d+\W+)?"
    r"(?i:user|assistant|human|gpt|prompt|question|answer)\W*: "
    r"|^\W*(?i:row|sample|example|output|response|completion|generated)(?: \d+)?: ?['\"]"
)
_IGNORED = re.compile(r"Exception ignored (?:in|on)\b")
EXCEPTION = re.compile(
    r"(?:[A-Za-z_]\w*\.)*_?[A-Z]\w*"
    r"(?:Error|Exception|Timeout|Exit|Interrupt|Dead|Failure|Failed|NotFound)\w*(?::\s|\s*$)"
)
_IDENTIFIER = re.compile(r"[A-Za-z_][\w.]*(?:\[[^\]]*\])?(?::\s|:?$)")
ERROR = re.compile(
    r"\b(?:ERROR|FATAL|CRITICAL|SEVERE)\b"
    r"|\b(?:Fatal Python error|Segmentation fault|Bus error|core dumped|terminate called|panic:|panicked at)"
    r"|(?:^|\s)(?:fatal|error|fatal error)\s*: (?!-?\d+\.\d)|^Error(?:: | (?!rates?\b))|\[error\]"
    r"|^\W*(?:Killed|Aborted|Terminated)\s*$|: Killed\s*$|: \d+ (?:Killed|Aborted|Segmentation)"
    r"|[Ee]xit(?:ed)? (?:with )?(?:exit )?(?:code|status):? [1-9]|exit(?:ed with)? code=[1-9]"
    r"|^\s*Warning\s+[A-Z]\w+\s+(?!from)\S+|^\s*Exit Code:\s+[1-9]"  # kubectl describe
    r"|^\s*(?:Status|Reason|State):\s+(?:Failed|Error|Evicted|OOMKilled|\w*BackOff|\w*Error)\s*$"
    r"|(?i:\bsegfault (?:at|encountered)\b)|^curl: \(\d+\)"
    r"|: command not found|\bNCCL WARN\b|\boom-kill\b|^make: \*\*\*|^what\(\):"
)
# No error's own form, but at a log's end it means one.
BAD_END = re.compile(
    r"(?i)\b(?:errors?|fail(?:ed|ure|s)?|cannot|could not|can't|unable|not found|denied|refused"
    r"|no (?:such|module named)"
    r"|not permitted|abort(?:ed|ing)?|killed|terminated|invalid|unknown|unexpected|timed? ?out"
    r"|exceeded|insufficient"
    r"|backoff|fatal|missing|unreachable|disconnected|unauthori[sz]ed|forbidden|rejected|corrupt(?:ed)?)\b"
)
# The program's own word that it came to its end.
_GOOD_END = re.compile(
    r"(?i)^\W*(?:(?:all )?done|finished|completed?|saved|wrote|success\w*)\b"
    r"(?!.*\b(?:error|fail|abort|kill|crash)\w*)"
)
_NO_BAD_END = re.compile(
    r"(?i)\b(?:0|no|zero) (?:errors?|fail\w*|invalid|rejected|missing|corrupt\w*)\b|error rate"
    r"|\berror[ =:]+\d+\.\d"  # a measured one
    r"|^\s*(?:Last )?State:\s"  # of a pod: its Reason follows
    r"|\b(?:errors?|fail\w*|rejected|aborted|timeouts?)[\w ]*[=:] *0\b"
    r"|\b(?:skip(?:s|ped|ping)|filter(?:ed|ing)|drop(?:ped|ping)|ignor(?:ed|ing)|falling back)\b"
)

# A program that was told to end says what it ends and what it no longer takes.
_SHUTDOWN = re.compile(
    r"(?i)^(?!.*\b(?:error|exception|fail|abort|kill|crash|unexpected|signal|timed? ?out|died))"
    r".*(?:\bserver\b.{0,20}\bterminated\W*$|\bis shutting down\W*$)"
)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a log.

    Attributes:
        text: the whole line.
        body: the line without time, level, rank and process; of an exception without a message
            with the source line that raised it behind.
        kind: exception, error, text, frame, quiet or ours.
        stage: which stage of ours wrote it, where the record says so.
        first: the index of the line where its traceback begins, else its own.
    """

    path: Path
    number: int
    text: str
    body: str = ""
    kind: str = "text"
    level: str = ""
    stage: str | None = None
    first: int = 0

    @property
    def is_evidence(self) -> bool:
        return self.kind in ("exception", "error", "text") and bool(self.body.strip())

    @property
    def ends_well(self) -> bool:
        return bool(_GOOD_END.search(self.body))

    @property
    def ends_badly(self) -> bool:
        harmless = _NO_BAD_END.search(self.body) or _SHUTDOWN.search(self.body)
        return bool(BAD_END.search(self.body)) and not harmless


@dataclasses.dataclass
class _Source:
    """Where one process of the log is in its traceback."""

    first: int | None = None
    code: str = ""
    is_ignored: bool = False
    quiet_record: bool = False


def classify(path: Path, lines: Iterable[tuple[int, str]]) -> list[Line]:
    """The lines, each with its kind."""
    numbered = [(number, text, _unwrapped(text)) for number, text in lines]
    prefix = _prefix([text for _, _, text in numbered])
    before = [prefix.match(text)[0] for _, _, text in numbered]  # type: ignore[index]  # or nothing
    counts = len(set(before)) > len(before) // 2  # lines or milliseconds, and not processes
    sources: dict[str, _Source] = {}
    found: list[Line] = []
    for (number, text, own), collected in zip(numbered, before, strict=True):
        origin, level, stage, body = _split(own[len(collected) :])
        origin += "" if counts else re.sub(r"\d+[:.][\d:.]*", "", collected)
        source = sources.setdefault(origin, _Source())
        kind, first = _kind(body, level, source, len(found))
        if stage is not None:
            kind = "quiet" if level not in _LOUD else "ours" if body.startswith("[") else "error"
        # Records of ours indent what follows their first line.
        source.quiet_record = bool(stage) or (source.quiet_record and text[:4].isspace())
        if kind == "exception" and re.fullmatch(r"[\w.]+:?", body) and source.code:
            body = f"{body} <- {source.code}"
        found.append(Line(path, number, text, body, kind, level, stage, first))
    return found


def _unwrapped(text: str) -> str:
    """A program's line without the JSON that a collector (Docker's log files, a cloud's) put around it."""
    if not text.startswith("{"):
        return text
    try:
        record = json.loads(text)
    except ValueError:
        return text
    collected = isinstance(record, dict) and {"stream", "textPayload", "MESSAGE"} & record.keys()
    inner = next((record[key] for key in _WRAPPED if key in record), None) if collected else None
    return inner.rstrip() if isinstance(inner, str) else text


def _prefix(texts: Sequence[str]) -> "re.Pattern[str]":
    """What a collector put before the lines, numbers aside; matches nothing where none did.

    Learnt from the log: what stands before tracebacks and records, if enough lines begin so. Worked
    example: `Aug 17 18:42:18 node1 vllm[8052]: `.
    """
    shapes: collections.Counter[str] = collections.Counter()
    for text in texts:
        anchor = _ANCHOR.search(text, 0, _MAX_PREFIX)
        if anchor is None:
            continue
        before = re.sub(r"(?:\([^()]*\b(?:pid|ip)=[^()]*\) *)+$", "", text[: anchor.start()])
        own, gap = before.rstrip(), before[len(before.rstrip()) :]
        is_quoted = own.endswith(("'", '"'))
        if own and not is_quoted and not re.search(rf"\b{_LEVEL}\b", own):
            shape = re.sub(r"(?:\\\s)+", r"\\s*+", re.escape(own))
            # A line of white space alone may have lost it; what a frame is indented by stays.
            shapes[re.sub(r"\d+", r"\\d++", shape) + f"(?:{gap})?"] += 1
    for shape, _ in shapes.most_common(1):
        prefix = re.compile(shape)
        if sum(bool(prefix.match(text)) for text in texts) >= _PREFIX_SHARE * len(texts):
            return re.compile(f"(?:{shape})?")
    return re.compile("")


def _split(text: str) -> tuple[str, str, str | None, str]:
    """(who wrote it, level, stage of ours, the rest)."""
    origin, body = "", text
    while matched := _ORIGIN.match(body):
        origin += re.sub(r"\d{4}-\S+Z ", "", matched[0]).strip()
        body = body[matched.end() :]
    for pattern in _RECORDS:
        if matched := pattern.match(body):
            parts = matched.groupdict()
            level = (parts.get("level") or parts.get("letter") or "").upper()
            return origin, level, parts.get("stage"), body[matched.end() :]
    return origin, "", None, _STAMP.sub("", body, count=1)


def _kind(body: str, level: str, source: _Source, index: int) -> tuple[str, int]:
    if level in _QUIET or (source.quiet_record and body[:4].isspace()):
        return "quiet", index
    if _IGNORED.match(body):
        source.is_ignored = True
        return "quiet", index
    if _TRACEBACK.match(body) or (_FRAME.match(body) and source.first is None):
        source.first, source.code = index, ""
        return "frame", index
    if source.first is not None:
        if not body.strip() or body[0].isspace():
            if not _FRAME.match(body) and not _CODE.fullmatch(body):
                source.code = body.strip() or source.code
            return "frame", source.first
        if not _IDENTIFIER.match(body):  # another process's line in between
            return ("error" if ERROR.search(body) else "text"), index
        first, source.first = source.first, None
        ignored, source.is_ignored = source.is_ignored, False
        return ("quiet" if ignored else "exception"), first
    source.is_ignored = False
    if _CHAINED.match(body) or _CODE.match(body):
        return "frame", index
    if EXCEPTION.match(body.lstrip()):
        return "exception", index
    if level not in _LOUD and _REQUEST.search(body):
        return "quiet", index
    return ("error" if level in _LOUD or ERROR.search(body) else "text"), index


def window(lines: Sequence[Line], index: int) -> str:
    """The lines around one, its traceback included: what decides between causes that share words."""
    first = max(lines[index].first - 6, index - 80, 0)
    return "\n".join(line.text for line in lines[first : index + 7])

r"""Records of variants on disk, and what makes a second call go on where the first one stopped.

    task.json        what is measured, on what: hashes of model and data, and how it is measured
    base.json        what the base makes of general text, measured by the first call
    results.jsonl    one record a variant and seed, appended the moment it ends, failures too
    runs/            a folder a variant and seed: what it was told, its log, answers and adapter

A record carries the fingerprint of its variant: a hash of its settings, its seed and the task. A
call runs the variants whose fingerprints have no good record yet. So another seed, another rate or
one more method is added to what is there, a failure is tried again, and changed settings never
borrow old figures. A folder holds one task: another model or other data would make a table whose
rows do not compare, and are refused by name, once there is a record.

A process may be killed while it writes. A last line without its end is therefore cut off, and its
variant run again; anything else that cannot be read is an error with its line.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_core.compare.variants import Variant
from lora_core.evaluate.estimate import Estimate
from lora_core.files import atomic_write

RESULTS, TASK, WORK, BASE_FILE = "results.jsonl", "task.json", "runs", "base.json"
Record = dict[str, Any]


def fingerprint(variant: Variant, identity: Mapping[str, Any], extra: object = None) -> str:
    """A hash of all that a variant's figures depend on.

    Args:
        variant: method, settings, seed.
        identity: the task's.
        extra: what else this variant sees: its examples, its system text.

    Returns:
        16 hexadecimal digits.
    """
    facts = variant.facts()
    del facts["swept"]  # the same settings are the same variant, swept or not
    text = json.dumps([facts, dict(identity), extra], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Results:
    """The records of a folder.

    Args:
        folder: of the comparison; it must exist.
        identity: the task's; the folder is bound to it.

    Attributes:
        records: the last good or failed record by fingerprint.

    Raises:
        ValueError: the folder holds another comparison, or a record that cannot be read.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.path = folder / RESULTS
        self.identity = json.loads(json.dumps(dict(identity)))
        self._bind(folder / TASK)
        self.records: dict[str, Record] = {r["fingerprint"]: r for r in self._read()}

    def _bind(self, file: Path) -> None:
        if not file.is_file():
            for there in (self.path, file.parent / WORK):  # whose folders are removed and made anew
                if there.exists():
                    raise ValueError(
                        f"{there} is there and {file.name}, which says of what, is not: choose "
                        "another --out"
                    )
            self._write(file)
            return
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            other = sorted(
                k for k in {*held, *self.identity} if _at(held, k) != _at(self.identity, k)
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
        if other and not self.path.is_file():  # nothing has ended here: a first try went wrong
            (file.parent / BASE_FILE).unlink(missing_ok=True)
            self._write(file)
        elif other:
            told = _differing(held, self.identity, other)
            raise ValueError(
                f"{file.parent} holds another comparison: {told}; choose another --out"
            )

    def _write(self, file: Path) -> None:
        atomic_write(file, json.dumps(self.identity, indent=2, ensure_ascii=False) + "\n")

    def _read(self) -> list[Record]:
        if not self.path.is_file():
            return []
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):  # a process was killed as it wrote this
            with self.path.open("r+b") as stream:
                stream.truncate(whole)
        found = []
        for number, line in enumerate(raw[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                record["fingerprint"], record["status"]  # both are needed
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{self.path}:{number}: not a record of a comparison ({error}); remove the line"
                ) from None
            found.append(record)
        return found

    def add(self, record: Record) -> None:
        """Append a record and have it on the disk."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            stream.flush()
        self.records[record["fingerprint"]] = record

    def done(self, mark: str) -> bool:
        """Whether the variant of a fingerprint has its figures."""
        return self.records.get(mark, {}).get("status") == "done"


def _at(facts: Any, key: str) -> Any:
    if not isinstance(facts, dict):
        raise TypeError("it should hold a JSON object")
    return facts.get(key)


def _differing(held: Mapping[str, Any], new: Mapping[str, Any], names: Sequence[str]) -> str:
    return "; ".join(f"{k} was {_short(held.get(k))}, is {_short(new.get(k))}" for k in names)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "…"


def estimate(facts: Mapping[str, Any]) -> Estimate:
    """The estimate that `Estimate.facts` wrote; null is NaN again."""
    numbers: dict[str, Any] = {k: math.nan if v is None else v for k, v in facts.items()}
    return Estimate(**numbers)


def over_seeds(values: Sequence[Estimate | float]) -> Estimate | float:
    """One figure of several seeds.

    Args:
        values: one a seed, at least one.

    Returns:
        One seed's value as it is, interval included. Of more their mean, with the least and the
        greatest in place of an interval, and "seeds" as what is counted: the spread that a reader
        who runs it once more should expect.
    """
    if len(values) == 1:
        return values[0]
    plain = [v.value if isinstance(v, Estimate) else float(v) for v in values]
    middle = sum(plain) / len(plain)
    return Estimate(middle, len(plain), min(plain), max(plain), "seeds", math.nan, "min–max")

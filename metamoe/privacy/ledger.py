"""A client's budget: how it is divided, and the ledger of what was spent, clients/NAME/privacy.json.

The ledger never leaves the client. It is written after a result and before anything of it can leave, so that
a killed stage starts again without loss; a second result of the same part is refused.
"""

import contextlib
import math

from metamoe.errors import UserError
from metamoe.privacy.accounting import least_noise, spent_epsilon
from metamoe.privacy.flags import UNIT, told
from metamoe.privacy.mechanisms import secret_generator
from metamoe.rundir import read_json, write_json

LEDGER = "privacy.json"
COUNT = 0.05  # of the budget, as a share of the squared signal-to-noise ratio, which adds up over parts
BESIDE_EXPERT = 0.1  # of relevance and of the vectors; the expert gets the rest
RELEASE = ("noise_multiplier", "sample_rate", "steps")


def open_budget(client, terms):
    """The Budget in the client's folder, None without terms; UserError where its ledger has other terms."""
    path = client / LEDGER
    kept = read_ledger(path) if path.exists() else None
    if kept and {key: kept[key] for key in ("epsilon", "delta", "parts")} != terms:
        has = f"its budget is {told(kept)} ({path}), not {told(terms)}"
        raise UserError(f"client {client.name}: {has}: a budget is given once for the same data")
    return Budget(path, terms, kept) if terms else None


def read_ledger(path):
    """A ledger that was cut off or edited is refused: a new one would forget what was spent."""
    with contextlib.suppress(UserError, TypeError, KeyError, ValueError, AttributeError):
        kept = read_json(path)
        numbers = [float(entry[key]) for entry in kept["spent"] for key in RELEASE]
        names = [entry[key] for entry in kept["spent"] for key in ("part", "of")]
        told(kept)
        if all(map(math.isfinite, [*numbers, kept["count"] or 0.0])) and all(map(str.isprintable, names)):
            return kept
    raise UserError(f"{path} is damaged: put it back: it is what remembers the spent budget")


def one_query(part, noise):
    """The bill of one Gaussian query over all records."""
    return {"spent": [{"part": part, **dict(zip(RELEASE, (noise, 1.0, 1), strict=True))}]}


class Budget:
    """The (epsilon, delta) of one client's upload. terms: of privacy_terms. kept: the ledger's content."""

    def __init__(self, path, terms, kept):
        self.path, self.terms, self.rng = path, terms, secret_generator()
        self.kept = kept or {**terms, "count": None, "spent": []}
        self.noiseless = math.isinf(terms["epsilon"])
        self.bill = {"spent": [], "clipping": {}}  # of the result that is being made

    def covers(self, part):
        return part in self.terms["parts"]

    def share(self, part):
        parts = self.terms["parts"]
        if part == "count":
            return COUNT
        return BESIDE_EXPERT if "expert" in parts else (1 - COUNT) / len(parts)

    def noise(self, part):
        """The noise multiplier of the count, of relevance or of the vectors: one Gaussian query each."""
        if self.noiseless:
            return 0.0
        scale = least_noise(lambda s: [(s, 1.0, 1)], self.terms["epsilon"], self.terms["delta"])
        return scale / math.sqrt(self.share(part))

    def expert_noise(self, rate, steps):
        """The noise multiplier with which all parts together spend the whole budget."""
        if self.noiseless:
            return 0.0
        others = [(self.noise(part), 1.0, 1) for part in ("count", *self.terms["parts"]) if part != "expert"]
        limits = self.terms["epsilon"], self.terms["delta"]
        return least_noise(lambda s: [*others, (s, rate, steps)], *limits)

    def count(self, records):
        """The noisy number of the records, at least 1; drawn once. All else computes with this one."""
        if self.kept["count"] is None:
            noise = self.noise("count")
            self.kept["count"] = max(1.0, float(len(records) + noise * self.rng.standard_normal()))
            self.settle(one_query("count", noise), "the records")
        return self.kept["count"]

    def check(self, part, of):
        """UserError where this part was spent; of: the result that it is wanted for."""
        for entry in self.kept["spent"]:
            if entry["part"] == part:
                spent = f"its budget was spent on {entry['of']} and pays for one release ({self.path})"
                raise UserError(f"client {self.path.parent.name}: {part} for {of}: {spent}")

    def charge(self, part, clipping, noise, rate=1.0, steps=1):
        """Put on the bill what the result that is being made spends of this part."""
        release = dict(zip(RELEASE, (noise, rate, steps), strict=True))
        self.bill["spent"].append({"part": part, **release})
        self.bill["clipping"][part] = clipping

    def settle(self, bill, of):
        """Write down what is on the bill of the result `of`, before it may leave; once for the same one."""
        for entry in bill["spent"]:
            if not any(old["part"] == entry["part"] and old["of"] == of for old in self.kept["spent"]):
                self.check(entry["part"], of)
                spent = [*self.kept["spent"], {**entry, "of": of}]
                self.check_total(spent)
                self.kept["spent"] = spent
                write_json(self.path, self.kept, private=True)

    def check_total(self, spent):
        """UserError where all of this together exceeds the budget."""
        if self.noiseless:
            return
        order = ["count", *self.terms["parts"]]
        spent = sorted(spent, key=lambda entry: order.index(entry["part"]))
        total = spent_epsilon([[entry[key] for key in RELEASE] for entry in spent], self.terms["delta"])
        if total > self.terms["epsilon"] + 0.01:  # the accountant's upper bound may be as much too high
            what = f"{spent[-1]['part']} would bring epsilon to {total:.2f}"
            raise UserError(
                f"client {self.path.parent.name}: {what}, {self.terms['epsilon']:g} is the budget"
            )

    def claim(self, bill):
        """What an upload's manifest says of its privacy; None where there is no guarantee."""
        clipping = bill["clipping"] | ({"relevance": 1.0} if self.covers("relevance") else {})
        return None if self.noiseless else {**self.terms, "unit": UNIT, "clipping": clipping}

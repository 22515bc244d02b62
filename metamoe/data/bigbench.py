"""BIG-bench, the language default's data: three client tasks and a public set.

A record is a dict with `prompt`, `answer`, `source` and, for client records, `choices`. Answers begin with
a space: they are appended to the prompt as they are.
"""

import re
import zlib

import numpy as np

from metamoe.data.fetch import BIGBENCH, fetch, read_members
from metamoe.errors import UserError

SENTIMENT = (
    "Determine whether given opinion is positive, negative, neutral or ambivalent in terms of its sentiment."
    "\nQ: {input}\nA:"
)


# client name -> (BIG-bench task, prompt, choices where the task does not list them)
CLIENTS = {
    "intent": ("intent_recognition", "{input}\nIntent:", None),
    "hotels": ("multiemo/hotels_sentence_en", SENTIMENT, None),
    # The type of a question's answer: a generation task with a closed set of answers; records with several
    # are left out.
    "question": (
        "natural_instructions/subtask046_miscellaenous_question_typing",
        "{input}\nType:",
        [
            "Abbreviation.",
            "Date.",
            "Entity.",
            "Event.",
            "Facility.",
            "Humans.",
            "Law.",
            "Location.",
            "Money.",
            "Organization.",
            "Other.",
            "Quantity.",
            "Time.",
        ],
    ),
}


# public task -> (records, prompt): first relatives of the client tasks, then much that is unrelated. The
# siblings multiemo/all_* and hotels_* hold the hotel client's sentences and are left out.
PUBLIC = {
    "multiemo/products_sentence_en": (450, SENTIMENT),
    "multiemo/medicine_sentence_en": (450, SENTIMENT),
    "multiemo/reviews_sentence_en": (300, SENTIMENT),
    "fact_checker/fever": (450, "{input}\nAnswer:"),
    "presuppositions_as_nli": (200, "{input}"),
    "epistemic_reasoning": (150, "{input}\nRelation:"),
    "entailed_polarity": (150, "{input}\nAnswer:"),
    "strategyqa": (200, "Question: {input}\nAnswer:"),
    "movie_recommendation": (150, "Find a movie similar to {input}\nAnswer:"),
    "implicatures": (200, "{input}\nDoes Speaker 2 mean yes or no?"),
    "social_support": (200, "Reply: {input}\nUnsupportive, neutral, or supportive?"),
    "sports_understanding": (150, "Statement: {input}\nPlausible or implausible?"),
    "goal_step_wikihow/goal_inference": (150, "{input}\nAnswer:"),
    "social_iqa": (200, "Question: {input}\nAnswer:"),
    "metaphor_boolean": (150, "{input}\nIs the second a paraphrase of the first?"),
    "disambiguation_qa": (150, "Sentence: {input}\nThe pronoun refers to:"),
    "qa_wikidata": (300, "{input}"),
    "tense": (150, "{input}\nAnswer:"),
    "cryptonite": (200, "Crossword clue: {input}\nAnswer:"),
    "linguistic_mappings/sentence_negation_json": (150, "{input}\nAnswer:"),
    "linguistic_mappings/question_formation_json": (150, "{input}\nAnswer:"),
    "unit_conversion/unit_identification": (150, "{input}\nAnswer:"),
    "gem/common_gen": (200, "{input}\nAnswer:"),
    "natural_instructions/*": (2600, "{input}\nAnswer:"),
}


MAX_CHARS = 300  # of a prompt: keeps the default run on a CPU; about 70 tokens


MAX_ANSWER_CHARS = 60


MIN_WORDS = (
    4  # of a client's text: one-word sentences ("No.") stand in every corpus and say nothing about a copy
)


def normalise(text):
    """Lower-case words and numbers alone, one space between: what two copies of a text have in common."""
    return " ".join(re.findall(r"\w+", text.lower()))


def client_texts(record):
    """What must not stand in the public set: the record's input and each of its fields (a question without
    its answer).
    """
    whole = normalise(record["input"])
    fields = [normalise(field.split(": ", 1)[-1]) for field in re.split(r"\n| \(Answer: ", record["input"])]
    return [text for text in [whole, *fields] if len(text.split()) >= MIN_WORDS]


def containment_filter(texts):
    """A function that says whether a text contains (as whole words) one of `texts`, normalised; near-linear
    in its length.
    """
    by_start = {}
    for words in {tuple(text.split()) for text in texts if text}:
        by_start.setdefault(words[: min(4, len(words))], []).append(words)

    def contains(text):
        words = tuple(normalise(text).split())
        for i in range(len(words)):
            for length in range(1, 5):
                for candidate in by_start.get(words[i : i + length], ()):
                    if words[i : i + len(candidate)] == candidate:
                        return True
        return False

    return contains


def to_record(example, source, template, choices=None):
    """A BIG-bench example as a record, or None where it has no single best answer or is too long for the
    default.
    """
    if choices and example["target"] not in ([choice] for choice in choices):
        return None
    if "target_scores" in example:
        choices = list(example["target_scores"])
    prompt = template.format(input=example["input"].strip())
    if "target_scores" in example:
        scores = example["target_scores"]
        best = [choice for choice, score in scores.items() if score == max(scores.values())]
        answer = best[0] if len(best) == 1 else ""
    else:
        target = example["target"]
        answer = target if isinstance(target, str) else target[0]
    answer = answer.strip()
    if not answer or len(prompt) > MAX_CHARS or len(answer) > MAX_ANSWER_CHARS:
        return None
    record = {"source": source, "input": example["input"].strip(), "prompt": prompt, "answer": " " + answer}
    if choices:
        record["choices"] = [" " + choice.strip() for choice in choices]
    return record


def load_bigbench(clients, sizes, n_public, seed):
    """Read the archive once; return (public records, {client: {"train" | "validation" | "test": records}}).

    The public set depends on `n_public` and the client tasks alone, never on the seed. A client's parts are
    disjoint and fixed by the seed; no two of its records share a field (the same question with two
    answers), so nothing of the test part is seen in training. `sizes`: {"train": n, "validation": n,
    "test": n}.
    """
    wanted = {task for task, _, _ in CLIENTS.values()} | set(PUBLIC)
    raw = {}
    archive = fetch(**BIGBENCH)
    prefix = "bigbench-1.0.0/bigbench/benchmark_tasks/"

    def is_wanted(member):
        task = member.removeprefix(prefix).removesuffix("/task.json")
        return member.endswith("/task.json") and (
            task in wanted or task.startswith("natural_instructions/subtask")
        )

    for member, content in read_members(archive, is_wanted):
        raw[member.removeprefix(prefix).removesuffix("/task.json")] = content["examples"]

    parts, private_texts = {}, []
    for (
        name
    ) in CLIENTS:  # every embedded client's texts leave the public set, whichever take part in this run
        task, template, choices = CLIENTS[name]
        private_texts += [text for example in raw[task] for text in client_texts(example)]
        if name in clients:
            parts[name] = split_client(
                name, [to_record(e, task, template, choices) for e in raw[task]], sizes, seed
            )
    return public_records(raw, containment_filter(private_texts), n_public), parts


def split_client(name, records, sizes, seed):
    """Shuffle by seed, drop records that share a field with an earlier one, and cut into the parts of
    `sizes`.
    """
    order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(records))
    kept, seen = [], set()
    need = sum(sizes.values())
    for i in order:
        record = records[i]
        if record is None:
            continue
        texts = client_texts(record)
        if texts and seen.isdisjoint(texts):
            seen.update(texts)
            kept.append(record)
            if len(kept) == need:
                break
    if len(kept) < need:
        raise UserError(
            f"client {name}: {len(kept)} distinct usable records, {need} asked for (--train-size "
            f"{sizes['train']} + "
            f"--validation-size {sizes['validation']} + --test-size {sizes['test']}): lower one of them"
        )
    parts, start = {}, 0
    for part, size in sizes.items():
        parts[part] = kept[start : start + size]
        start += size
    return parts


def public_records(raw, contains_private, n_public):
    """D_0: `n_public` records, every source in proportion to its quota in PUBLIC, without any client's
    text.
    """
    private = {task for task, _, _ in CLIENTS.values()}
    rng = np.random.default_rng(0)  # the public set is one set for everybody: not a matter of the run's seed
    total = sum(quota for quota, _ in PUBLIC.values())
    records, spare, seen = [], [], set()
    for task, (quota, template) in PUBLIC.items():
        sources = (
            [t for t in sorted(raw) if t.startswith(task[:-1]) and t not in private]
            if task.endswith("*")
            else [task]
        )
        for source in sources:
            usable = []
            for example in raw[source]:
                record = to_record(example, source, template)
                if (
                    record is not None
                    and normalise(record["prompt"]) not in seen
                    and not contains_private(record["prompt"] + record["answer"])
                ):
                    seen.add(normalise(record["prompt"]))
                    usable.append(record)
            usable = [usable[i] for i in rng.permutation(len(usable))]
            take = round(n_public * quota / total / len(sources))
            records += usable[:take]
            spare += usable[take : 8 * take]
    if len(records) < n_public:  # short sources: the rest from what is left of the others
        records += [spare[i] for i in rng.permutation(len(spare))[: n_public - len(records)]]
    if len(records) < n_public:
        raise UserError(f"--public-size {n_public}: only {len(records)} usable public records here: lower it")
    return [records[i] for i in sorted(rng.permutation(len(records))[:n_public])]

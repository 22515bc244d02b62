"""What an expert gains on BIG-bench tasks: which of them can be clients (docs/results-clients.md).

Each task is trained on alone, as train_expert.py --data private does but for --epochs, and scored on
validation records; no test record and no unified model is seen. A line a task: usable records, the accuracy
of the seed model and of the expert, and the gain with its paired 95% interval.
"""

import math

from common import MACHINE, command_line, header, row

from metamoe.backbones import load_backbone
from metamoe.backbones.training import train
from metamoe.data import bigbench
from metamoe.data.bigbench import SENTIMENT, Task
from metamoe.data.splits import rng_of
from metamoe.errors import UserError
from metamoe.presets import PRESETS
from metamoe.report.statistics import is_right, paired_bootstrap

# Tasks of enough records with short prompts and closed answers; of the public set's sources `goal` alone
CANDIDATES = {
    **bigbench.CLIENTS,
    **bigbench.MORE_CLIENTS,
    "step": Task("goal_step_wikihow/step_inference", "{input}"),
    "order": Task("goal_step_wikihow/step_ordering", "{input}\nAnswer:"),
    "goal": Task("goal_step_wikihow/goal_inference", "{input}"),
    "adjectives": Task("hyperbaton", "{input}\nAnswer:"),
    "hotels-de": Task("multiemo/hotels_sentence_de", SENTIMENT),
    "context": Task("contextual_parametric_knowledge_conflicts", "{input}\nAnswer:"),
    "objects": Task("reasoning_about_colored_objects", "{input}\nAnswer:"),
    "wikipedia": Task("vitaminc_fact_verification", "{input}\nTrue, False, or Neither?"),
    "dialog": Task(
        "movie_dialog_same_or_different", "{input} said by the same or different people?\nAnswer:"
    ),
    "pronoun": Task("winowhy", "{input}\nThe above reasoning is"),
    "fallacy": Task("logical_fallacy_detection", "{input}\nAnswer:"),
    "language": Task("language_identification", "{input}\nLanguage:"),
    "word-problems": Task("elementary_math_qa/question_only", "{input}\nAnswer:"),
}


def parts_of(name, task, archive, args):
    """(training records, validation records, usable ones in all); fewer where there are not enough."""
    examples = archive.examples[task.task]
    records = [bigbench.to_record(example, *task) for example in examples]
    order = rng_of(args.seed, name).permutation(len(records))[: 4 * (args.train + args.validation)]
    usable = [records[i] for i in order if records[i]]
    sizes = {"train": args.train, "validation": args.validation}
    parts = bigbench.split_client(name, usable, sizes, args.seed)
    return parts["train"], parts["validation"], sum(record is not None for record in records)


def right(backbone, model, records, name):
    scores = backbone.scores(model, records, label=name)
    return {name: is_right([values.tolist() for values in scores], records)}


def gain(name, records, validation, args):
    """(the seed model's and the expert's right answers on the validation records)."""
    preset = PRESETS[args.backbone]
    backbone = load_backbone(args.backbone, device=args.device)
    before = right(backbone, backbone.model, validation, name)
    model = backbone.add_lora(preset["lora_rank"], preset["lora_alpha"], args.seed)
    batch_size = preset["expert_batch"]
    steps = args.epochs * math.ceil(len(records) / batch_size)
    options = {key: preset[key] for key in ("optimizer", "weight_decay")}
    options |= {"seed": args.seed, "label": name, "warmup_steps": min(preset["warmup_steps"], steps // 10)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained, "lr": preset["expert_lr"]}]
    train(backbone, model, records, groups, steps=steps, batch_size=batch_size, **options)
    return before, right(backbone, model, validation, name)


def main():
    parser = command_line(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=CANDIDATES, default=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=11, help="random seed, one that no table uses")
    parser.add_argument("--train", type=int, default=400, help="training records")
    parser.add_argument("--validation", type=int, default=200, help="validation records")
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    print(f"{MACHINE}; random seed {args.seed}, {args.train} records, {args.epochs} epochs\n")
    header("client | task | usable records | seed model | expert | gain", "llrrrr")
    archive = bigbench.read_archive({}, CANDIDATES)
    for name in args.tasks:
        task = CANDIDATES[name]
        try:
            records, validation, usable = parts_of(name, task, archive, args)
        except UserError as error:
            row(name, task.task, "too few", "-", "-", error)
            continue
        before, after = gain(name, records, validation, args)
        found = paired_bootstrap(after, before, args.seed)
        low, high = found["interval"]
        means = [f"{100 * values[name].mean():.1f}" for values in (before, after)]
        row(name, task.task, usable, *means, f"{found['difference']:+.1f} ({low:+.1f} to {high:+.1f})")


if __name__ == "__main__":
    main()

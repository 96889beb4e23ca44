"""Trains the demo checkpoint: prepare, train (resumes by itself), settle, export, evaluate, plot; --help says how."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

WORK = Path("demo-training")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="where data and state are kept (default: %(default)s)")
    verbs = parser.add_subparsers(dest="verb", required=True)
    prepare_ = verbs.add_parser("prepare", help="collect text, learn the vocabulary, encode")
    prepare_.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="take that of a trained folder")
    train = verbs.add_parser("train", help="train, going on from the last state if there is one")
    train.add_argument("--steps", type=int, required=True, help="steps in all; the schedule follows from it")
    train.add_argument("--threads", type=int, default=os.cpu_count())
    train.add_argument("--start-from", type=Path, metavar="FOLDER", help="begin with an exported folder's weights")
    verbs.add_parser(
        "settle", help="after training: move the routers' correction biases until no expert is nearly idle"
    )
    export = verbs.add_parser("export", help="write the checkpoint folder from the last state")
    export.add_argument("folder", type=Path)
    evaluate = verbs.add_parser("evaluate", help="measure the last state and its exported folder; prints JSON")
    evaluate.add_argument("folder", type=Path, help="the exported checkpoint")
    evaluate.add_argument("--dialogues", type=int, default=200)
    evaluate.add_argument("--questions", type=int, default=50, help="of each kind")
    evaluate.add_argument("--text-tokens", type=int, default=100_000)
    plot = verbs.add_parser("plot", help="draw loss, largest logit and expert load over the steps")
    plot.add_argument("picture", type=Path)
    args = parser.parse_args()
    actions = {
        "prepare": prepare,
        "train": train_model,
        "settle": settle_model,
        "export": export_model,
        "evaluate": evaluate_model,
        "plot": plot_log,
    }
    return actions[args.verb](args)


def prepare(args: argparse.Namespace) -> int:
    import shutil

    from k2lite.text.tokenizer import load_tokenizer
    from tools.demo_training.batches import encode_texts
    from tools.demo_training.export import TOKENIZER_FILES
    from tools.demo_training.text_sources import texts

    args.work.mkdir(exist_ok=True)
    plain = list(texts(held_out=False))
    if args.tokenizer is None:
        learn_vocabulary(plain, args.work)
    else:
        for name in TOKENIZER_FILES:
            shutil.copy(args.tokenizer / name, args.work / name)
    tokenizer = load_tokenizer(args.work)
    for held_out in (False, True):
        name = "held_out.npy" if held_out else "train.npy"
        ids = encode_texts(tokenizer, plain if not held_out else list(texts(held_out=True)), args.work / name)
        print(f"{name}: {len(ids)} tokens")
    return 0


def learn_vocabulary(plain: list[str], folder: Path) -> None:
    """Learn it from a quarter of the texts and seeded samples of the dialogues; write the tokenizer's files."""
    import random

    from tools.demo_training import words
    from tools.demo_training.questions import question
    from tools.demo_training.shape import N_VOCAB
    from tools.demo_training.tools_data import tool_dialogue
    from tools.demo_training.vocabulary import train_vocabulary, write_vocabulary

    rng = random.Random("vocabulary")
    opening = "tool_declare You are Kimi, an AI assistant created by Moonshot AI."
    dialogues = [opening + str(tool_dialogue(rng, held_out=False)).replace("'", '"') for _ in range(6000)]
    asked = [" ".join((made.question, made.answer)) for made in (question(rng, held_out=False) for _ in range(6000))]
    sample = rng.sample(plain, len(plain) // 4)
    copied = {*words.VERBS, *words.NOUNS, *words.PARAMETERS, *words.RESULT_FIELDS, *words.ENUM_VALUES}
    write_vocabulary(folder, train_vocabulary([*sample, *dialogues, *asked], N_VOCAB, copied))


def train_model(args: argparse.Namespace) -> int:
    import numpy as np
    import torch

    from k2lite.text.tokenizer import load_tokenizer
    from tools.demo_training.batches import Batches
    from tools.demo_training.beginning import begin
    from tools.demo_training.export import load_exported
    from tools.demo_training.shape import model_config
    from tools.demo_training.training import Settings, Trainer
    from tools.demo_training.transformer import Transformer

    torch.set_num_threads(args.threads)
    settings = Settings(steps=args.steps)
    torch.manual_seed(settings.seed)
    model = Transformer(model_config())
    begin(model)
    text = np.load(args.work / "train.npy")
    batches = Batches(load_tokenizer(args.work), text, seed=settings.seed, tokens=settings.tokens_per_step)
    trainer = Trainer(model, settings, batches.batch)
    state = args.work / "state.pt"
    if state.is_file():
        trainer.load(state)
    elif args.start_from is not None:
        load_exported(model, args.start_from)
    trainer.run(state, args.work / "train_log.jsonl")
    return 0


def settle_model(args: argparse.Namespace) -> int:
    """The biases are judged with the values that the export will have, and stored in the last state."""
    import numpy as np
    import torch

    from k2lite.text.tokenizer import load_tokenizer
    from tools.demo_training.evaluation import load_rounded
    from tools.demo_training.settling import Marks, sample_rows, settle_biases
    from tools.demo_training.shape import model_config
    from tools.demo_training.transformer import Transformer

    path = args.work / "state.pt"
    model = load_rounded(path, Transformer(model_config()))
    dialogues, texts = sample_rows(load_tokenizer(args.work), np.load(args.work / "train.npy"))
    settle_biases(model, dialogues, texts, Marks())
    state = torch.load(path, weights_only=True)
    for name, value in model.state_dict().items():
        if name.endswith("mlp.bias"):
            state["model"][name] = value
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    return 0


def export_model(args: argparse.Namespace) -> int:
    import torch

    from tools.demo_training.export import export
    from tools.demo_training.shape import CONFIG, model_config
    from tools.demo_training.transformer import Transformer

    model = Transformer(model_config())
    model.load_state_dict(torch.load(args.work / "state.pt", weights_only=True)["model"])
    export(model, CONFIG, args.work, args.folder)
    return 0


def evaluate_model(args: argparse.Namespace) -> int:
    import json

    import numpy as np
    import torch

    import k2lite
    from tools.demo_training import evaluation
    from tools.demo_training.batches import Batches, text_row
    from tools.demo_training.shape import model_config
    from tools.demo_training.training import Settings
    from tools.demo_training.transformer import Transformer

    engine = k2lite.load(args.folder)
    model = evaluation.load_rounded(args.work / "state.pt", Transformer(model_config()))
    step = int(torch.load(args.work / "state.pt", weights_only=True)["step"])
    train, held_out = np.load(args.work / "train.npy"), np.load(args.work / "held_out.npy")[: args.text_tokens]
    settings = Settings(steps=step)
    batches = Batches(engine.tokenizer, train, seed=settings.seed, tokens=settings.tokens_per_step)
    seen = [window for at in range(step) for window in batches.text_windows(at)]
    turns = evaluation.held_out_turns(engine.tokenizer, args.dialogues, args.questions)
    dialogues = list({id(turn.ids): turn.ids for turn in turns if len(turn.ids) > 100}.values())
    spoken = [text_row(np.array(ids, dtype=np.uint16)) for ids in dialogues]
    texts = [text_row(held_out[at : at + 1024]) for at in range(0, 64 * 1024, 1024)]
    report = {
        "step": step,
        "text_tokens_trained_on": sum(map(len, seen)),
        "perplexity": evaluation.text_perplexity(model, held_out),
        "kneser_ney_5_same_tokens": evaluation.ngram_perplexity(seen, held_out),
        "kneser_ney_5_all_text": evaluation.ngram_perplexity([train], held_out),
        "turns": evaluation.judge_turns(model, engine, turns),
        "routing": evaluation.routing_table(model, spoken, texts),
        "largest_logit_by_layer": {
            "dialogues": evaluation.largest_logits(model, spoken),
            "texts": evaluation.largest_logits(model, texts),
        },
    }
    print(json.dumps(report, indent=1))
    return 0


def plot_log(args: argparse.Namespace) -> int:
    import json

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (args.work / "train_log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    figure, (loss, logit, load) = pyplot.subplots(3, 1, figsize=(9, 9), sharex=True)
    loss.plot(steps, [line["loss"] for line in lines])
    loss.set_ylabel("loss (nats, fully weighted tokens)")
    logit.plot(steps, [line["max_logit"] for line in lines], color="tab:red")
    logit.set_ylabel("largest attention logit")
    for layer in range(len(lines[0]["max_load"])):
        load.plot(steps, [line["max_load"][layer] for line in lines], linewidth=0.8, label=f"MoE layer {layer + 1}")
    load.set_ylabel("busiest expert over mean")
    load.set_xlabel("step")
    load.legend(fontsize=7, ncol=3)
    figure.tight_layout()
    figure.savefig(args.picture, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())

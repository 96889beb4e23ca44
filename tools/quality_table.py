"""Makes the table of docs/quality.md that is of the demo model: KL, perplexity and tool calls after each rule.

    python tools/quality_table.py --work demo-training        # the folder of tools/train_demo.py prepare

Weights are quantized by the code of `k2lite quantize`; texts are read by the batched float32 model that trained, after
a check that it gives the runtime's logits. A document (a window of text, a dialogue) is read from an empty context.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from k2lite.calibration import Calibration
    from k2lite.quant.checkpoint import Checkpoint
    from k2lite.quant.moments import Moments
    from k2lite.text.tokenizer import Tokenizer
    from tools.demo_training.transformer import Transformer
    from tools.quality.measures import Scores
    from tools.quality.texts import Judged

LARGEST_DIFFERENCE = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="default: the demo model")
    parser.add_argument("--work", type=Path, required=True, help="where held_out.npy and train.npy are")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--text-tokens", type=int, default=8192)
    parser.add_argument("--dialogues", type=int, default=100)
    parser.add_argument("--calibration-tokens", type=int, default=24576)
    parser.add_argument("--dialogue-share", type=float, default=0.5, help="of the calibration's documents")
    parser.add_argument("--only", metavar="N,N", help="rules by number, from 0; the others' scores come from --scores")
    parser.add_argument("--scores", type=Path, metavar="FILE", help="keep every document's scores here, as JSON")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    from k2lite.demo_folder import DEMO_FOLDER

    args.model = args.model or DEMO_FOLDER
    with tempfile.TemporaryDirectory() as scratch:
        subject = prepare(args, Path(scratch))
        scores = measure(args, subject)
    print("\n".join(table(scores, subject.judged.texts)))
    return 0


@dataclass(frozen=True)
class Subject:
    """The model, what it is judged on, and what is known of its matrices' inputs."""

    checkpoint: Checkpoint
    model: Transformer
    tokenizer: Tokenizer
    judged: Judged
    moments: Moments
    hessians: Calibration


def prepare(args: argparse.Namespace, scratch: Path) -> Subject:
    import k2lite
    from k2lite.calibration import Calibration
    from k2lite.model_folder import open_model
    from k2lite.moment_recorder import MomentRecorder
    from k2lite.quant.moments import open_moments
    from tools.demo_training.evaluation import forward
    from tools.demo_training.export import load_exported
    from tools.demo_training.transformer import Transformer
    from tools.quality import texts
    from tools.quality.inputs import record

    engine = k2lite.load(args.model)
    _, checkpoint = open_model(args.model)
    model = Transformer(engine.config).eval()
    load_exported(model, args.model)
    judged = texts.judged(engine.tokenizer, args.work, args.text_tokens, args.dialogues)
    sample = judged.documents[0][:64]
    apart = float((engine.logits(sample) - forward(model, texts.packed([sample])[0])).abs().max())
    if apart > LARGEST_DIFFERENCE:
        raise SystemExit(f"the batched model's logits are {apart:g} from the runtime's: it computes something else")
    rows = texts.calibration(engine.tokenizer, args.work, args.calibration_tokens, args.dialogue_share)
    recorder, hessians = MomentRecorder(), Calibration(checkpoint, "", args.calibration_tokens)
    read = record(model, recorder, rows)
    record(model, hessians, rows)
    widths = checkpoint.schema.matrix_widths()
    recorder.write(scratch / "moments", widths, model=checkpoint.fingerprint(), tokens=read)
    tokens = sum(map(len, judged.documents))
    print(f"logits within {apart:.1e} of the runtime's; {read} tokens of calibration, {tokens} judged", file=sys.stderr)
    moments = open_moments(scratch / "moments", checkpoint)
    return Subject(checkpoint, model, engine.tokenizer, judged, moments, hessians)


def measure(args: argparse.Namespace, subject: Subject) -> dict[str, Scores]:
    """Scores of every rule, in order; those that --only leaves out as they were kept."""
    from tools.demo_training.export import load_values, values_of
    from tools.quality.measures import Scores, score
    from tools.quality.rules import WAYS, values_after

    judged_by = [subject.checkpoint.fingerprint(), args.text_tokens, args.dialogues]
    kept = _kept(args.scores, judged_by)
    chosen = set(map(int, args.only.split(","))) if args.only else set(range(len(WAYS)))
    values = values_of(subject.checkpoint)
    reference = None
    for number, way in enumerate(WAYS):
        if number and number not in chosen:  # the reference's logits are needed by all
            continue
        began = time.monotonic()
        made = values_after(way, subject.checkpoint, values, subject.moments, subject.hessians)
        load_values(subject.model, subject.checkpoint.schema, made)
        quantized = time.monotonic()
        scores, logits = score(subject.model, subject.tokenizer, subject.judged, reference)
        reference = reference or logits
        kept[way.title] = scores.as_dict()
        seconds = f"{quantized - began:.0f} s to quantize, {time.monotonic() - quantized:.0f} to judge"
        print(f"{number} {way.title}: {seconds}", file=sys.stderr)
        if args.scores:
            args.scores.write_text(json.dumps({"of": judged_by, "scores": kept}), encoding="utf-8")
    return {way.title: Scores.from_dict(kept[way.title]) for way in WAYS if way.title in kept}


def _kept(path: Path | None, judged_by: list[Any]) -> dict[str, Any]:
    """What an earlier run has left, if it was of this model and these texts."""
    if path is None or not path.is_file():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    scores: dict[str, Any] = stored["scores"] if stored["of"] == judged_by else {}
    return scores


def table(scores: dict[str, Scores], texts: int) -> list[str]:
    """Markdown. KL in thousandths of a nat a token, with 95 % intervals."""
    from tools.quality.measures import mean_kl, perplexity, ratio
    from tools.quality.rules import WAYS

    lines = [
        "| Rule | KL text | KL dialogues | as a ratio to mse | perplexity | top-1 | calls exact | right tool, valid |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        mine, base = scores.get(way.title), scores.get(way.base)
        if mine is None:
            continue
        kl = [_interval(mean_kl(mine, part), 1000, 3) for part in (slice(0, texts), slice(texts, None))]
        compared = "-" if base is None or way.title == way.base else _interval(ratio(mine, base), 1, 2)
        top1, exact, valid = mine.sums[:, 2].sum() / mine.counts.sum(), mine.exact.mean(), mine.valid.mean()
        cells = [way.title, *kl, compared, f"{perplexity(mine, slice(0, texts)):.2f}"]
        lines.append(f"| {' | '.join(cells)} | {top1:.2%} | {exact:.1%} | {valid:.1%} |")
    calls = len(next(iter(scores.values())).exact)
    return [*lines, "", f"{calls} calls; {texts} windows of text."]


def _interval(estimate: list[float], factor: float, digits: int) -> str:
    value, low, high = (f"{factor * number:.{digits}f}" for number in estimate)
    return f"{value} ({low} to {high})"


if __name__ == "__main__":
    sys.exit(main())

"""Records every block of a model that the ``Trainer`` of transformers trains. Its numbers are logged with the loss, without padding.

python examples/logging/trainer_callback.py --output runs/trainer
torchprobe watch runs/trainer/run.safetensors

Needs ``pip install transformers accelerate``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from torchprobe.integrations.transformers import RecordActivations


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Tokens with padding, and whether the first one is large: your data."""
    found = []
    for tokens in torch.randint(1, 100, (count, 12)):
        mask = torch.arange(12) < torch.randint(4, 13, ())
        found.append({"input_ids": tokens * mask, "attention_mask": mask.long(), "labels": (tokens[0] > 50).long()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--window", type=int, default=10, help="steps in a window")
    parser.add_argument("--output", type=Path, default=Path("runs/trainer"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)
    recording = RecordActivations(save=options.output / "run.safetensors")
    arguments = TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        logging_steps=options.window,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(BertForSequenceClassification(config), arguments, train_dataset=rows(256), callbacks=[recording])
    trainer.train()
    print(recording.history)


if __name__ == "__main__":
    main()

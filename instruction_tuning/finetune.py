"""Fine-tune a causal language model on instructions, by any method.

    python instruction_tuning/finetune.py --row llama2_7b/vblora
    python instruction_tuning/finetune.py --row llama2_7b/lora --plan
    python instruction_tuning/finetune.py --model_name_or_path DIR --data FILE.json --method vblora --held_out 100

Takes every flag of Hugging Face's TrainingArguments besides its own (--help). Flags after --row override the row. The
loss is over the responses alone. With --held_out the loss on rows that are not trained on is measured before the
training and after each epoch.

The output folder receives last/ (the adapter), run.json (the settings), training.json (losses, stored parameters,
times) and the trainer's last checkpoint. A run that is finished is not run again; one that was interrupted goes on from
its last checkpoint. Several GPUs: `accelerate launch` with a file of configs/, or --device_map auto.
"""

from __future__ import annotations

from pathlib import Path

from instruct_rows import row
from vblora_experiments import commands, instruct

RUNS = Path(__file__).resolve().parents[1] / "runs" / "instruct"
FOLDER = instruct.Folder(
    "finetune.py", {"data_format": "alpaca", "data": "yahma/alpaca-cleaned"}, row, RUNS, str(__doc__)
)
main = FOLDER.main

if __name__ == "__main__":
    commands.run(main, "finetune")

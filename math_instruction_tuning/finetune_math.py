"""Fine-tune a causal language model on mathematics with worked answers, by any method.

    python math_instruction_tuning/finetune_math.py --row mistral_7b/vblora
    python math_instruction_tuning/finetune_math.py --row gemma_7b/lora_xs --plan
    python math_instruction_tuning/finetune_math.py --model_name_or_path DIR --data FILE.json --method vblora

Everything else is as in instruction_tuning/finetune.py; the rows are MetaMathQA's, with the columns query and response,
or with `--data_format gsm8k` GSM8K's own, whose answers are brought to MetaMathQA's form.
"""

from __future__ import annotations

from pathlib import Path

from math_rows import row
from vblora_experiments import commands, instruct

RUNS = Path(__file__).resolve().parents[1] / "runs" / "math"
FOLDER = instruct.Folder(
    "finetune_math.py", {"data_format": "metamath", "data": "meta-math/MetaMathQA"}, row, RUNS, str(__doc__)
)
main = FOLDER.main

if __name__ == "__main__":
    commands.run(main, "finetune_math")

"""Word error rates of VB-LoRA on Whisper that others print, on a public page of benchmarks.

They are secondary: neither the model, the languages, the rates and epochs, VB-LoRA's settings nor the normaliser could
be had (the page's source is probably DAMA, arXiv 2602.01008: Whisper large-v2). No row here claims to repeat them, and
no difference to them is printed.
"""

from __future__ import annotations

# By the sets' names there, as printed; the first of them is a fraction, it seems.
PRINTED = {
    "FLEURS, unseen languages": "0.5075",
    "FLEURS, languages seen little": "28",
    "Common Voice, unseen languages": "59.81",
}
NOTE = (
    "Secondary, printed by others for VB-LoRA on a Whisper under settings that could not be had, and not compared: "
    + "; ".join(f"{name} {figure}" for name, figure in PRINTED.items())
    + "."
)

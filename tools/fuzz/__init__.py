"""Draws small checkpoints and requests from a seed and compares this package with transformers.

    python -m tools.fuzz --family smolvlm --seed 300 --count 100 --minimise

Needs torch and transformers 5. A case is a dictionary of knobs, each of which sets one thing apart
from a plain checkpoint of the family (`knobs.py`), and a chat with its pictures and clips
(`requests.py`); `checkpoint.py` makes the model folder of it with tools/make_fixtures, transformers
gives the numbers (`reference.py`) and `verdict.py` compares ids, pixels, logits at every position
and greedy tokens, alone and in a batch. One line a case:

    smolvlm 317 {"text.hidden_act": "mish"} refused by ours: hidden_act 'mish' is not supported

Verdicts: `equal`, `refused by both`, `within a limit` (a documented one, `limits.py`), `not made`
(transformers cannot write such a checkpoint); what counts as a failure and makes the exit status 1:
`refused by ours`, `taken by ours` (only transformers refuses), `differs`, `crashed` (an error that
is not a PipesError). `--minimise` takes knobs and
parts of the chat away as long as the same kind of failure stays, and prints what is left as JSON;
`--case JSON` runs such a setting again. `--keep DIR` leaves the model folders there.
"""

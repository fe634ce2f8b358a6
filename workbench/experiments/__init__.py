"""Experiments, one file each, and what each of them asks: read by ``workbench --help``, which
imports none of them.
"""

QUESTIONS = {
    "names": "Does an unlearned pair of names come back, the more often it was repeated?",
    "keyword": "Do withheld titles or names come back from texts that never mention them? (TOFU)",
    "verbatim": "Do unlearned passages of a book come back word for word?",
    "ladder": "How much must an attack text have to do with the forget set?",
    "relearn": "What does another relearning attack on a run's models win back?",
    "suffix": (
        "Do adversarial suffixes bring forgotten answers back, and what is left of the retained "
        "ones?"
    ),
    "few-shot": (
        "Do solved questions about other forgotten facts, in front of a question, bring its answer "
        "back?"
    ),
    "quantise": "Do 8-bit or 4-bit weights bring forgotten answers back?",
    "triggers": "What does a forget-token in a harmless question break? What does it give away?",
    "representation": "Where in the model are the forgotten answers, if anywhere?",
    "sharpness": "How does the loss lie around every model before the attack?",
}

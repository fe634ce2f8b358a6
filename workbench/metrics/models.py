"""Metrics of whole models: what they answer, what a change of weights costs, what attacks do."""

from __future__ import annotations

from workbench.metrics.declare import ALONE, Metric, declared

RECALL = Metric(
    "recall",
    "recall",
    "Share of facts whose whole answer is the greedy continuation, mean over paraphrases.",
    "share",
    "more is answered",
    where=(ALONE, "attack_step", "alpha", "bits", "shots"),
)
ANSWER_PROBABILITY = Metric(
    "answer_probability",
    "answer probability",
    "Probability of the right answer's tokens given the question, mean over facts.",
    "share",
    "more is answered",
    where=(ALONE, "attack_step", "bits", "shots"),
)
LOSS = Metric(
    "loss",
    "loss",
    "Cross-entropy of the target tokens, mean over tokens.",
    "nats per token",
    "less is predicted",
    where=(ALONE, "attack_step", "bits", "shots"),
)
DISRUPTION = Metric(
    "disruption",
    "disruption",
    "What a change of weights costs on texts that were to be kept: KL from the base, or the "
    "relative rise of the loss (arm).",
    "nats per token, or share",
    "more is lost",
    0.0,
    (ALONE, "alpha"),
)
BUDGET = Metric(
    "budget", "disruption budget", "Disruption that was allowed.", "as disruption", "more may cost"
)
BUDGET_REACHED = Metric(
    "budget_reached", "budget reached", "1 where the change was scaled to the budget, 0 where not."
)
BUDGET_SET = Metric("budget_set", "set in the budget", "1 for every set whose mean is the budget.")
STEPS = Metric("steps", "steps of unlearning", "Optimiser steps, taken or allowed (arm).", "steps")
PARAMETERS_TRAINED = Metric(
    "parameters_trained",
    "tensors trained",
    "Weight tensors that were declared trainable, and that changed (arm).",
    "tensors",
)
OBJECTIVE_FORGET = Metric(
    "objective_forget",
    "forget objective",
    "The forget term of the objective along the training.",
    "as the objective",
    where=("training_step",),
)
ALPHA = Metric(
    "alpha", "scale", "Factor by which the change of weights was scaled.", "", "more of the change"
)
DISPLACEMENT = Metric(
    "displacement",
    "displacement",
    "Length of the change of weights.",
    "L2 norm",
    "weights moved farther",
    0.0,
)
RELATIVE_DISPLACEMENT = Metric(
    "relative_displacement",
    "relative displacement",
    "Length of the change of weights over the length of the base's weights.",
    "share",
    "weights moved farther",
    0.0,
)
NOTHING_RECALLED = Metric(
    "nothing_recalled",
    "nothing recalled",
    "1 where some scale of the change silenced every query, 0 where none did.",
)
DIVERGED_AT = Metric(
    "diverged_at",
    "diverged at",
    "First step of an attack at which a number was not finite.",
    "steps",
)
RANDOM_FACTS_POSSIBLE = Metric(
    "random_facts_possible",
    "random facts possible",
    "0 where the attacker's texts have no answers to exchange.",
)
LEAKED_SUBJECTS = Metric(
    "leaked_subjects",
    "leaked subjects",
    "Subjects of queries that an attack text names.",
    "subjects",
)
LEAKED_ANSWERS = Metric(
    "leaked_answers",
    "leaked answers",
    "Answers of queries that stand in an attack text.",
    "answers",
)
LEAKED_PASSAGES = Metric(
    "leaked_passages",
    "leaked passages",
    "Queried passages of which an attack text holds words in a row.",
    "passages",
)
SHARED_5GRAMS = Metric(
    "shared_5grams", "shared 5-grams", "Five-grams that attack texts share with queries.", "5-grams"
)
SYNTACTIC_SIMILARITY = Metric(
    "syntactic_similarity",
    "syntactic similarity",
    "Similarity of the sentence patterns of attack texts and queries.",
    "share",
)
BENIGN = Metric("benign", "benign", "1 where an attack text gives no queried answer away.")
RECOVERY_RECALL = Metric(
    "recovery_recall",
    "recovered recall",
    "Recall after the attack minus that of a control (arm), paired by seed and fact.",
    "share",
    "more comes back than in the control",
    where=("attack_step",),
)
RECOVERY_ANSWER_PROBABILITY = Metric(
    "recovery_answer_probability",
    "recovered answer probability",
    "Answer probability after the attack minus that of a control (arm), paired by seed and fact.",
    "share",
    "more comes back than in the control",
    where=("attack_step",),
)
SMOOTHING_EFFECT = Metric(
    "smoothing_effect",
    "effect of smoothing",
    "Recall of the plain method minus that of the smoothed one under the same attack.",
    "share",
    "smoothing resists more",
    where=("attack_step",),
)
AREA_UNDER_RECOVERY = Metric(
    "area_under_recovery",
    "mean recall along the attack",
    "Area under the recall curve over the range of steps.",
    "share",
    "more comes back",
)
STEPS_TO_RECOVER = Metric(
    "steps_to_recover",
    "steps to recover",
    "First measured step at which recall reaches the target; infinite where it never does.",
    "steps",
    "comes back later",
)
EFFECT_RECALL = Metric(
    "effect_recall",
    "recall beyond the never-learned model",
    "Recall minus that of the never-learned model under the same attack, paired.",
    "share",
    "more comes back than the attack teaches",
    where=("attack_step",),
)
ASR = Metric(
    "asr",
    "attack success rate",
    "Share of prompts that are continued with the forgotten name (Wilson's interval).",
    "share",
    "more comes back",
    where=("attack_step",),
)
ROUGE_L = Metric(
    "rouge_l",
    "ROUGE-L F1",
    "ROUGE-L F1 of greedy continuations with the passage, mean over passages.",
    "share",
    "more is recited",
    where=("attack_step",),
)
ROUGE_L_RECALL = Metric(
    "rouge_l_recall",
    "ROUGE-L recall",
    "Share of the passage's words that the continuation holds in their order.",
    "share",
    "more is recited",
    where=("attack_step",),
)
VERBATIM_RUN = Metric(
    "verbatim_run",
    "longest verbatim run",
    "Longest run of words as in the passage, as a share of the continuation.",
    "share",
    "more is recited",
    where=("attack_step",),
)
PASSAGES_WITH_A_RUN = Metric(
    "passages_with_a_run",
    "passages with a verbatim run",
    "Passages of which five words in a row are recited.",
    "passages",
    "more is recited",
    where=("attack_step",),
)
DROPPED_PASSAGES = Metric(
    "dropped_passages",
    "passages left out",
    "Attack passages that repeat words that are asked for.",
    "passages",
)
FEW_SHOT_EFFECT = Metric(
    "few_shot_effect",
    "what demonstrations bring back",
    "Recall behind demonstrations minus that of the control (arm), paired by seed and fact.",
    "share",
    "more comes back",
    where=("shots",),
)
QUANTISE_EFFECT = Metric(
    "quantise_effect",
    "what rounding brings back",
    "Recall with rounded weights minus that with the weights as they are, paired.",
    "share",
    "more comes back",
    where=("bits",),
)
QUANTISED_SHARE = Metric(
    "quantised_share",
    "weights that keep their change",
    "Share of changed weights whose code differs from the base's after rounding.",
    "share",
    where=("bits",),
)
QUANTISED_CARRIED = Metric(
    "quantised_carried",
    "change that rounding carries",
    "Projection of the rounded change on the change, as a share of it.",
    "share",
    where=("bits",),
)
QUANTISED_COSINE = Metric(
    "quantised_cosine",
    "cosine of rounded and true change",
    "Cosine of the change after rounding and the change.",
    "cosine",
    where=("bits",),
)
SEARCH_LOSS = Metric(
    "search_loss",
    "loss of the suffix search",
    "Best loss of the searched suffix so far.",
    "nats per token",
    where=("search_step",),
)
SUFFIX_TOKEN = Metric(
    "suffix_token",
    "token of the suffix",
    "Place of a token in the searched suffix.",
    where=("token",),
)
FORGET_TOKENS = Metric(
    "forget_tokens",
    "forget-tokens in the suffix",
    "Words of the suffix that are forget-tokens.",
    "words",
)
SUFFIX_EFFECT = Metric(
    "suffix_effect",
    "what a suffix changes",
    "Recall with a suffix minus that without (or beyond a control's, arm), paired.",
    "share",
    "more is answered",
)
SUFFIX_EFFECT_PROBABILITY = Metric(
    "suffix_effect_probability",
    "what a suffix changes in answer probability",
    "Answer probability with a suffix minus that without (or beyond a control's, arm), paired.",
    "share",
    "more is answered",
)

DECLARED = declared(vars())

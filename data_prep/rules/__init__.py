"""The rules of the corpus filter: what is measured of a document, what is taken out of it, and what is kept."""

from data_prep.rules.filter import EMPTY, Filter, Outcome, explain
from data_prep.rules.registry import RULES, Bounds, Rule
from data_prep.rules.sets import SETS, RuleSet, with_thresholds

__all__ = ["EMPTY", "RULES", "SETS", "Bounds", "Filter", "Outcome", "Rule", "RuleSet", "explain", "with_thresholds"]

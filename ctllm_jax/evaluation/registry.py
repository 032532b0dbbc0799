"""The benchmarks: the place of lm-eval's definitions, their datasets, and the reported metrics.

A stock task is lm-eval's own, prompt for prompt. Naming its folder avoids lm-eval's index of all tasks (13 to 18
seconds); the folders here are read in at most 0.03 s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

CMMLU_GROUPS: Mapping[str, tuple[str, ...]] = {
    "cmmlu_stem": (
        "anatomy", "astronomy", "college_actuarial_science", "college_engineering_hydrology", "college_mathematics",
        "college_medical_statistics", "computer_science", "conceptual_physics", "electrical_engineering",
        "elementary_mathematics", "genetics", "high_school_biology", "high_school_chemistry",
        "high_school_mathematics", "high_school_physics", "machine_learning", "virology"),
    "cmmlu_humanities": (
        "arts", "chinese_history", "chinese_literature", "college_law", "global_facts", "international_law",
        "jurisprudence", "logical", "marxist_theory", "philosophy", "professional_law", "world_history",
        "world_religions"),
    "cmmlu_social_science": (
        "ancient_chinese", "business_ethics", "chinese_civil_service_exam", "chinese_food_culture",
        "chinese_foreign_policy", "chinese_teacher_qualification", "college_education", "economics", "education",
        "elementary_chinese", "ethnology", "high_school_geography", "high_school_politics", "journalism", "management",
        "marketing", "modern_chinese", "professional_accounting", "professional_psychology", "public_relations",
        "security_study", "sociology"),
    "cmmlu_other": (
        "agronomy", "chinese_driving_rule", "clinical_knowledge", "college_medicine", "computer_security",
        "construction_project_management", "elementary_commonsense", "elementary_information_and_technology",
        "food_science", "human_sexuality", "legal_and_moral_basis", "nutrition", "professional_medicine",
        "sports_science", "traditional_chinese_medicine"),
    "cmmlu_china_specific": (
        "ancient_chinese", "chinese_civil_service_exam", "chinese_driving_rule", "chinese_food_culture",
        "chinese_foreign_policy", "chinese_history", "chinese_literature", "chinese_teacher_qualification",
        "construction_project_management", "elementary_chinese", "elementary_commonsense", "ethnology",
        "high_school_politics", "modern_chinese", "traditional_chinese_medicine"),
}
"""Subjects of CMMLU by the categories of its authors (arXiv 2306.09212); China-specific subjects are also in another
category."""

CEVAL_GROUPS: Mapping[str, tuple[str, ...]] = {
    "ceval-valid_stem": (
        "computer_network", "operating_system", "computer_architecture", "college_programming", "college_physics",
        "college_chemistry", "advanced_mathematics", "probability_and_statistics", "discrete_mathematics",
        "electrical_engineer", "metrology_engineer", "high_school_mathematics", "high_school_physics",
        "high_school_chemistry", "high_school_biology", "middle_school_mathematics", "middle_school_biology",
        "middle_school_physics", "middle_school_chemistry", "veterinary_medicine"),
    "ceval-valid_social_science": (
        "college_economics", "business_administration", "marxism", "mao_zedong_thought", "education_science",
        "teacher_qualification", "high_school_politics", "high_school_geography", "middle_school_politics",
        "middle_school_geography"),
    "ceval-valid_humanities": (
        "modern_chinese_history", "ideological_and_moral_cultivation", "logic", "law",
        "chinese_language_and_literature", "art_studies", "professional_tour_guide", "legal_professional",
        "high_school_chinese", "high_school_history", "middle_school_history"),
    "ceval-valid_other": (
        "civil_servant", "sports_science", "plant_protection", "basic_medicine", "clinical_medicine",
        "urban_and_rural_planner", "accountant", "fire_engineer", "environmental_impact_assessment_engineer",
        "tax_accountant", "physician"),
    "ceval-valid_hard": (
        "advanced_mathematics", "discrete_mathematics", "probability_and_statistics", "college_chemistry",
        "college_physics", "high_school_mathematics", "high_school_chemistry", "high_school_physics"),
}
"""Subjects of C-Eval by the categories of its authors (arXiv 2305.08322); the hard ones are also in STEM."""

GAOKAO = ("biology", "chemistry", "chinese", "geography", "history", "mathcloze", "mathqa", "physics")


@dataclass(frozen=True)
class Benchmark:
    """A task or a group of tasks that can be requested by name."""

    folder: str
    """Folder of its definition: below lm-eval's `tasks`, or below our `definitions` where `ours` is set."""
    metric: str = "acc"
    """The main metric, by lm-eval's name."""
    ours: bool = False
    members: tuple[str, ...] = field(default=())
    """Tasks of our group over stock tasks; empty: given by the definition."""


BENCHMARKS: Mapping[str, Benchmark] = {
    "boolq": Benchmark("super_glue/boolq"),
    "cb": Benchmark("super_glue/cb"),
    "copa": Benchmark("super_glue/copa"),
    "sglue_rte": Benchmark("super_glue/rte"),
    "multirc": Benchmark("super_glue/multirc"),
    "wic": Benchmark("super_glue/wic"),
    "piqa": Benchmark("piqa", metric="acc_norm"),
    "social_iqa": Benchmark("siqa"),
    "hellaswag": Benchmark("hellaswag", metric="acc_norm"),
    "winogrande": Benchmark("winogrande"),
    "arc_easy": Benchmark("arc", metric="acc_norm"),
    "arc_challenge": Benchmark("arc", metric="acc_norm"),
    "openbookqa": Benchmark("openbookqa", metric="acc_norm"),
    "commonsense_qa": Benchmark("commonsense_qa"),
    "mmlu": Benchmark("mmlu/default"),
    **{f"mmlu_{group}": Benchmark("mmlu/default") for group in ("stem", "humanities", "social_sciences", "other")},
    **{name: Benchmark("humaneval", metric="pass@1") for name in ("humaneval", "humaneval_instruct")},
    "humaneval_64": Benchmark("humaneval", metric="pass@64"),
    **{name: Benchmark("mbpp", metric="pass_at_1") for name in ("mbpp", "mbpp_instruct")},
    "nq_open": Benchmark("nq_open", metric="exact_match"),
    "triviaqa": Benchmark("triviaqa", metric="exact_match"),
    "lambada_openai": Benchmark("lambada"),
    "lambada_standard": Benchmark("lambada"),
    "squadv2": Benchmark("squadv2", metric="f1"),
    "gsm8k": Benchmark("gsm8k", metric="exact_match"),
    "ceval-valid": Benchmark("ceval"),
    **{group: Benchmark("ceval", members=tuple(f"ceval-valid_{subject}" for subject in subjects))
       for group, subjects in CEVAL_GROUPS.items()},
    "cmmlu": Benchmark("cmmlu"),
    **{group: Benchmark("cmmlu", members=tuple(f"cmmlu_{subject}" for subject in subjects))
       for group, subjects in CMMLU_GROUPS.items()},
    **{f"agieval_gaokao_{subject}": Benchmark("agieval") for subject in GAOKAO},
    "cvalues_responsibility": Benchmark("cvalues", ours=True),
    "cvalues_responsibility_generate": Benchmark("cvalues", ours=True),
}

FOLDER_OF_PREFIX: Mapping[str, str] = {"mmlu_": "mmlu_stem", "cmmlu_": "cmmlu", "ceval-valid_": "ceval-valid"}
"""Another name with this prefix is a subject of that benchmark."""


def find_benchmark(name: str) -> Benchmark | None:
    """The entry of a task, group or subject; None for an unknown name."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    for prefix, parent in FOLDER_OF_PREFIX.items():
        if name.startswith(prefix):
            return BENCHMARKS[parent]
    return None

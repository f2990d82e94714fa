"""Citations of a model card: the papers whose methods a training run used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# Key, title, authors, year and arXiv number of each paper, and a test of the command and its hyper-parameters.
_Paper = tuple[str, str, str, int, str, Callable[[str, Mapping[str, Any]], bool]]
_PAPERS: tuple[_Paper, ...] = (
    (
        "xiao2023cpack",
        "C-Pack: Packed Resources For General Chinese Embeddings",
        "Xiao, Shitao and Liu, Zheng and Zhang, Peitian and Muennighoff, Niklas and Lian, Defu and Nie, Jian-Yun",
        2023,
        "2309.07597",
        lambda command, flags: command == "train",
    ),
    (
        "reimers2019sentence",
        "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks",
        "Reimers, Nils and Gurevych, Iryna",
        2019,
        "1908.10084",
        lambda command, flags: command == "train",
    ),
    (
        "oord2018representation",
        "Representation Learning with Contrastive Predictive Coding",
        "van den Oord, Aaron and Li, Yazhe and Vinyals, Oriol",
        2018,
        "1807.03748",
        lambda command, flags: command == "train",
    ),
    (
        "gao2021scaling",
        "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
        "Gao, Luyu and Zhang, Yunyi and Han, Jiawei and Callan, Jamie",
        2021,
        "2101.06983",
        lambda command, flags: (flags.get("sub_batch_size") or flags.get("sub_batch_tokens") or 0) > 0,
    ),
    (
        "kusupati2022matryoshka",
        "Matryoshka Representation Learning",
        "Kusupati, Aditya and Bhatt, Gantavya and Rege, Aniket and Wallingford, Matthew and others",
        2022,
        "2205.13147",
        lambda command, flags: bool(flags.get("use_mrl")),
    ),
    (
        "solatorio2024gistembed",
        "GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning",
        "Solatorio, Aivin V.",
        2024,
        "2402.16829",
        lambda command, flags: flags.get("false_negative_margin") is not None,
    ),
    (
        "robinson2020hard",
        "Contrastive Learning with Hard Negative Samples",
        "Robinson, Joshua and Chuang, Ching-Yao and Sra, Suvrit and Jegelka, Stefanie",
        2020,
        "2010.04592",
        lambda command, flags: bool(flags.get("hardness_mode")),
    ),
    (
        "li2023gte",
        "Towards General Text Embeddings with Multi-stage Contrastive Learning",
        "Li, Zehan and Zhang, Xin and Zhang, Yanzhao and Long, Dingkun and Xie, Pengjun and Zhang, Meishan",
        2023,
        "2308.03281",
        lambda command, flags: bool({"query_to_query", "doc_to_doc"} & {*(flags.get("directions") or ())}),
    ),
    (
        "hofstatter2020marginmse",
        "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation",
        "Hofstätter, Sebastian and Althammer, Sophia and Schröder, Michael and Sertkan, Mete and Hanbury, Allan",
        2020,
        "2010.02666",
        lambda command, flags: bool(flags.get("knowledge_distillation")) and flags.get("kd_loss_type") == "margin_mse",
    ),
    (
        "hu2021lora",
        "LoRA: Low-Rank Adaptation of Large Language Models",
        "Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and others",
        2021,
        "2106.09685",
        lambda command, flags: bool(flags.get("use_lora")),
    ),
    (
        "xiao2022retromae",
        "RetroMAE: Pre-Training Retrieval-oriented Language Models Via Masked Auto-Encoder",
        "Xiao, Shitao and Liu, Zheng and Shao, Yingxia and Cao, Zhao",
        2022,
        "2205.12035",
        lambda command, flags: command == "pretrain",
    ),
    (
        "xiao2022retromaev2",
        "RetroMAE v2: Duplex Masked Auto-Encoder For Pre-Training Retrieval-Oriented Language Models",
        "Xiao, Shitao and Liu, Zheng",
        2022,
        "2211.08769",
        lambda command, flags: flags.get("pretrain_method") == "dupmae",
    ),
)


def citations_section(command: str, hyperparameters: Mapping[str, Any]) -> str:
    """Return the section with a BibTeX entry of each paper whose method was used.

    Args:
        command: "train" or "pretrain".
        hyperparameters: Flags of the run by name.

    Returns:
        The section in Markdown.
    """
    entries = [
        f"@misc{{{key},\n  title = {{{title}}},\n  author = {{{authors}}},\n  year = {{{year}}},\n"
        f"  eprint = {{{number}}},\n  archivePrefix = {{arXiv}}\n}}"
        for key, title, authors, year, number, applies in _PAPERS
        if applies(command, hyperparameters)
    ]
    return "## Citation\n\n```bibtex\n" + "\n\n".join(entries) + "\n```" if entries else ""

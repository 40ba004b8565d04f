# SPDX-License-Identifier: Apache-2.0
"""Model cards that load with this package."""

import json

from huggingface_hub import ModelCard, ModelCardData


def build_model_card(
    repo_id: str,
    description: str = "",
    license: str | None = None,
    class_names: list[str] | None = None,
    example_class: int | str | None = 0,
    example_prompt: str | None = None,
) -> ModelCard:
    """A card whose snippet runs.

    Args:
        repo_id (`str`): hub id or folder, as written in the snippet.
        description (`str`, *optional*, defaults to `""`): what the model was trained on, how, and its limits;
            Markdown.
        license (`str`, *optional*): the licence's identifier on the hub.
        class_names (`list[str]`, *optional*): names of the classes, listed in the card where there are at most 100.
        example_class (`int` or `str`, *optional*, defaults to 0): the class in the snippet; None: unconditional.
        example_prompt (`str`, *optional*): the text in the snippet, in place of a class, of a model that takes texts.

    Returns:
        `huggingface_hub.ModelCard`: YAML header and text.
    """
    data = ModelCardData(
        license=license,
        library_name="mar_hf",
        pipeline_tag="unconditional-image-generation" if example_prompt is None else "text-to-image",
        tags=["mar_hf", "diffusers", "autoregressive-image-generation", "image-generation"],
    )
    call = "pipe()" if example_class is None else f"pipe(class_labels=[{example_class!r}])"
    if example_prompt is not None:
        call = f"pipe(prompt={json.dumps(example_prompt, ensure_ascii=False)})"
    name = repo_id.rstrip("/").split("/")[-1]
    parts = [f"---\n{data.to_yaml()}\n---\n\n# {name}\n"]
    parts.append(
        description.strip()
        or "Images from an autoregressive model over continuous tokens (arXiv:2406.11838), run by `mar_hf`."
    )
    parts.append(
        "\n## Use\n\n```python\nfrom mar_hf import MARPipeline\n\n"
        f'pipe = MARPipeline.from_pretrained("{repo_id}")\nimage = {call}.images[0]\nimage.save("image.png")\n```'
    )
    if class_names and len(class_names) <= 100:
        parts.append("\n## Classes\n\n" + ", ".join(f"{i}: {name}" for i, name in enumerate(class_names)))
    parts.append(
        "\n## Citation\n\n```bibtex\n@inproceedings{li2024autoregressive,\n"
        "  title={Autoregressive Image Generation without Vector Quantization},\n"
        "  author={Li, Tianhong and Tian, Yonglong and Li, He and Deng, Mingyang and He, Kaiming},\n"
        "  booktitle={NeurIPS},\n  year={2024}\n}\n```\n"
    )
    return ModelCard("\n".join(parts))

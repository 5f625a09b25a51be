"""One process of `benchmarks.first_answer`: the steps of generate.py, each timed.

Arguments: model folder, image, question, maximum tokens. Prints one JSON object.
"""

import gc
import json
import sys
import time


def main(folder: str, image: str, question: str, tokens: str) -> None:
    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def mark(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[name] = now - last
        last = now

    gc.disable()  # as generate.py does
    from eval.predictor import Predictor, _tokenizer

    gc.enable()
    from configs.model import GenerationConfig
    from data.render import Renderer
    from models.dual_tower.dual_tower import DualTowerVLM
    from models.kernels.packed_block import pack_blocks
    from models.vision_language_model import VisionLanguageModel
    from models.weights.folder import find_files
    from models.weights.model_folder import load_model

    mark("imports")
    model = load_model({c.model_type: c for c in (VisionLanguageModel, DualTowerVLM)}, folder)
    mark("building the model and loading its weights")
    tokenizer = _tokenizer(find_files(folder))
    mark("tokenizer")
    pack_blocks(model.right)
    mark("laying the weights out for oneDNN")
    renderer = Renderer(tokenizer, model.config.tokens_per_tile, model.config.left_context)
    predictor = Predictor(model, renderer)
    settings = GenerationConfig(max_new_tokens=int(tokens))
    answer = predictor.answer([([predictor.tiles(image)], question)], settings)[0]
    mark("image and answer")
    print(json.dumps(seconds | {"tokens": answer.tokens, "ttft_ms": answer.ttft_ms}))


if __name__ == "__main__":
    main(*sys.argv[1:])

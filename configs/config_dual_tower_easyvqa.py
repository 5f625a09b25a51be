"""The embedded default: easy-VQA and EfficientNet-Lite0, both from PyPI; towers from scratch; minutes on two CPU cores."""

from configs.schema import Config

CONFIG = Config()

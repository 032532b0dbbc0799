"""The dataset directory: conversion of text files, the format on disk, random access. No jax."""

from ctllm_jax.config.extras import need_train

need_train()

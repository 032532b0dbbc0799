"""Evaluation by a judge model: prompts, requests, replies and scores."""

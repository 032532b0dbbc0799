"""The HTTP server: the OpenAI protocol, the chat page and metrics."""

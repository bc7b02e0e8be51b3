"""An engine on top of any server that speaks OpenAI's completions API."""

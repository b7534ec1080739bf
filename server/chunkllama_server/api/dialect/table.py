"""The fields of other servers, by name: what each becomes here, or why it is refused.

Read from the request schemas of vLLM, SGLang, llama.cpp, TGI and huggingface_hub, Ollama, NVIDIA
Dynamo and NIM, TensorRT-LLM, Mistral, Anthropic and OpenRouter. Names that an endpoint has itself
are its own fields and are not looked up.
"""

from __future__ import annotations

from chunkllama_server.api.dialect.meanings import (
    REPETITION_NAMES,
    THINKING_BUDGETS,
    THINKING_LEVELS,
    banned_ids,
    continued,
    effort,
    flag,
    has_penalty,
    limit,
    mime_type,
    not_sampled,
    output_config,
    reasoning,
    scales_before,
    seed,
    thinking,
    thinking_config,
    to,
    tool_choice,
    top_logprobs,
)
from chunkllama_server.api.dialect.row import TEMPLATED, Row, harmless, refused, translated
from chunkllama_server.api.dialect.values import (
    answer_format,
    chat_format_of,
    constraint,
    text_format_of,
    token_limit,
)

# Objects whose members are read as if they stood in the body itself.
CONTAINERS = {
    "extra_body": "openai-python's argument, sent as it is",
    "generation_config": "Gemini, Transformers",
    "generationConfig": "Gemini",
    "google": "Gemini",
    "inferenceConfig": "Bedrock",
    "model_kwargs": "LangChain",
    "nvext": "NVIDIA Dynamo and NIM",
    "options": "Ollama",
    "parameters": "TGI",
    "sampling_params": "SGLang, TensorRT-LLM",
}

_STRUCTURED = (
    translated(
        "guided_json json_schema schema response_schema guided_schema responseSchema "
        "response_json_schema responseJsonSchema",
        "`structured_outputs.json`",
        "vLLM, NIM, SGLang, llama.cpp, Gemini",
        to("structured_outputs.json"),
    ),
    translated(
        "guided_regex regex regex_pattern",
        "`structured_outputs.regex`",
        "vLLM, SGLang, TabbyAPI",
        to("structured_outputs.regex"),
    ),
    translated(
        "guided_choice choice choices",
        "`structured_outputs.choice`",
        "vLLM",
        to("structured_outputs.choice"),
    ),
    translated(
        "guided_grammar ebnf",
        "`structured_outputs.grammar`, as GBNF or Lark",
        "vLLM, SGLang",
        to("structured_outputs.grammar"),
    ),
    translated(
        "guided_json_object json_mode",
        "`structured_outputs.json_object`",
        "vLLM, Together",
        flag("structured_outputs.json_object"),
    ),
    translated(
        "response_mime_type responseMimeType",
        "`structured_outputs.json_object` for `application/json`",
        "Gemini",
        mime_type,
    ),
    translated(
        "output_config",
        "`response_format` (in responses `text.format`) and the effort of the thoughts",
        "Anthropic",
        output_config,
        TEMPLATED,
    ),
    translated("toolChoice", "`tool_choice`", "AI SDK", tool_choice, TEMPLATED, off=("", {})),
    refused(
        "toolConfig tool_config",
        "send tools and tool_choice",
        "Bedrock, Gemini",
        endpoints=TEMPLATED,
    ),
    refused("output_config", "send response_format", "Anthropic", endpoints=("completions",)),
    refused(
        "force_words_ids forced_bos_token_id forced_eos_token_id begin_suppress_tokens "
        "sequence_bias constraints",
        "send structured_outputs or logit_bias",
        "Transformers",
    ),
    refused("bad_words_ids", "send bad_words", "Transformers"),
    translated(
        "grammar grammar_string",
        "`structured_outputs`: GBNF or Lark text, or `{type: json or regex, value}`",
        "llama.cpp, TGI, TabbyAPI",
        lambda value, _: constraint(value),
    ),
    translated(
        "format",
        '`structured_outputs`: `"json"` or a schema',
        "Ollama",
        lambda value, _: answer_format(value),
    ),
    translated(
        "response_format",
        "`text.format`; a regex or grammar is `structured_outputs`",
        "chat",
        lambda value, _: text_format_of(value),
        ("responses",),
    ),
    translated(
        "text",
        "`response_format`",
        "the Responses API",
        lambda value, _: chat_format_of(value),
        ("chat", "completions"),
    ),
    refused("structural_tag", "send structured_outputs", "vLLM, SGLang"),
    refused("guided_whitespace_pattern whitespace_pattern", "white space is fixed", "vLLM"),
    refused("grammar_lazy grammar_triggers", "send tools", "llama.cpp", quoted=True),
    harmless("guided_decoding_backend", "there is one grammar engine", "vLLM"),
)
_LIMITS = (
    translated(
        "n_predict max_new_tokens num_predict max_tokens max_completion_tokens max_output_tokens "
        "max_tokens_to_sample max_gen_len maxOutputTokens maxTokens tokens_to_generate",
        "`max_tokens`, in responses `max_output_tokens`; -1 and -2 are no limit",
        "llama.cpp, TGI, SGLang, Ollama, Anthropic, Gemini, the other endpoints",
        limit,
    ),
    translated("min_new_tokens", "`min_tokens`", "SGLang, Transformers", to("min_tokens")),
    translated("stop_sequences stop_strings stopSequences stopping_strings stop_sequence",
               "`stop`", "Anthropic, Transformers, Gemini, SillyTavern, KoboldCpp", to("stop")),
    translated("ban_eos_token bypass_eos", "`ignore_eos`", "TabbyAPI, KoboldCpp",
               flag("ignore_eos")),
    translated("no_stop_trim", "`include_stop_str_in_output`", "SGLang",
               flag("include_stop_str_in_output")),
    translated("truncate prompt_truncate_len truncation_length", "`truncate_prompt_tokens`",
               "TGI, Fireworks, text-generation-webui", to("truncate_prompt_tokens"),
               off=(False, 0, ""), quoted=True),
    translated("n_cmpl num_return_sequences candidate_count candidateCount", "`n`",
               "llama.cpp, Transformers, Gemini", to("n"), ("chat", "completions")),
    refused("stop_regex", "send stop strings", "SGLang"),
    refused("max_length min_length", "send max_tokens or min_tokens", "Transformers",
            quoted=True),
    refused("t_max_predict_ms max_time", "send max_tokens", "llama.cpp, Transformers", (0,),
            quoted=True),
    refused("n_indent", "there is no such sampler", "llama.cpp", (0,), quoted=True),
    refused("repetition_detection", "send stop strings or max_tokens", "vLLM"),
    translated("max_thinking_tokens thinking_budget reasoning_budget thinking_budget_tokens",
               "`thinking_token_budget`; -1 is no budget", "Dynamo, Qwen, llama.cpp",
               lambda value, _: token_limit(value, "thinking_token_budget"), TEMPLATED),
    refused("truncation_side", "the prompt's last tokens are kept", "vLLM", ("left",)),
    refused("num_beams", "send use_beam_search and n", "Transformers", (1,), quoted=True),
    refused("best_of", "send n", "text completions", (1,), ("chat",), quoted=True),
    refused("n best_of num_return_sequences candidate_count candidateCount",
            "a response has one answer", "chat, text completions", (1,), ("responses",),
            quoted=True),
    refused("early_stopping diversity_penalty", "beam search has no such option", "Transformers",
            (False, 0), quoted=True),
)  # fmt: skip
_SAMPLING = (
    translated(REPETITION_NAMES, "`repetition_penalty`",
               "llama.cpp, Ollama, KoboldCpp", to("repetition_penalty")),
    translated("topP", "`top_p`", "Gemini", to("top_p")),
    translated("topK", "`top_k`", "Gemini", to("top_k")),
    translated("random_seed sampling_seed", "`seed`; -1 is none", "Mistral, SGLang", seed),
    translated("do_sample", "false is `temperature: 0`", "TGI, Transformers", not_sampled),
    translated("greed_sampling", "`temperature: 0`", "Dynamo", flag("temperature", 0)),
    translated("n_probs top_n_tokens", "`logprobs`, in chat with `top_logprobs`",
               "llama.cpp, TGI", top_logprobs, ("chat", "completions"), off=(0, ""),
               quoted=True),
    translated("extra_key", "`cache_salt`", "SGLang", to("cache_salt")),
    translated("suppress_tokens banned_tokens", "`logit_bias` of -100", "Transformers, TabbyAPI",
               banned_ids, off=([], "")),
    translated("banned_strings", "`bad_words`", "TabbyAPI, KoboldCpp", to("bad_words")),
    refused("custom_token_bans", "send logit_bias", "text-generation-webui"),
    refused("typical_p typical typ_p tfs_z tfs encoder_repetition_penalty guidance_scale "
            "cfg_scale max_temp min_temp temp_exponent smoothing_curve",
            "there is no such sampler; leave it at 1", "TGI, llama.cpp, Transformers, TabbyAPI",
            (1,), quoted=True),
    refused("mirostat mirostat_mode mirostat_target mirostat_lr dynatemp_range "
            "dynamic_temperature xtc_probability dry_multiplier top_a "
            "epsilon_cutoff eta_cutoff penalty_alpha no_repeat_ngram_size smoothing_factor "
            "top_n_sigma nsigma skew adaptive_target min_keep",
            "there is no such sampler; leave it at 0",
            "llama.cpp, OpenRouter, Transformers, Fireworks", (0, -1, False), quoted=True),
    refused("temperature_last", "the temperature comes before the other samplers",
            "text-generation-webui, TabbyAPI", refused_if=scales_before, quoted=True),
    refused("repeat_last_n penalty_last_n rep_pen_range repetition_penalty_range penalty_range "
            "repetition_context_size",
            "penalties look at the whole text; leave it out or send -1",
            "llama.cpp, Ollama, KoboldCpp, MLX", (-1,), refused_if=has_penalty, quoted=True),
    refused("spaces_between_special_tokens", "text is decoded as it was encoded", "vLLM", (True,),
            quoted=True),
    refused("logits_processors custom_logit_processor logits_processor logit_bias_exp",
            "no code of a request is run", "vLLM, SGLang"),
    refused("logprobs", "send top_logprobs and include message.output_text.logprobs", "chat",
            endpoints=("responses",), quoted=True),
    refused("logprob_token_ids", "send top_logprobs", "vLLM, SGLang"),
    refused("watermark watermarking", "there is no watermark", "TGI, vLLM", quoted=True),
    refused("end_id pad_id", "send stop_token_ids", "TensorRT-LLM"),
    harmless("mirostat_tau mirostat_eta dynatemp_exponent xtc_threshold dry_base "
             "dry_allowed_length dry_penalty_last_n dry_sequence_breakers penalize_nl "
             "adaptive_decay",
             "belongs to a sampler that is off", "llama.cpp"),
    harmless("samplers", "samplers have one order", "llama.cpp"),
)  # fmt: skip
_PROMPT = (
    translated("inputs", "`prompt`", "TGI", to("prompt"), ("completions",),
               off=()),
    translated("return_full_text", "`echo`", "TGI", flag("echo"), ("completions",)),
    translated("enable_thinking think thinking",
               "`chat_template_kwargs.enable_thinking` and `.thinking`; an effort is "
               "`reasoning_effort`, in responses `reasoning.effort`",
               "Qwen, Ollama, DeepSeek, GLM, Anthropic", thinking, TEMPLATED),
    translated("thinking_config thinkingConfig",
               "`thinking_token_budget`; a level is `reasoning_effort`, in responses "
               "`reasoning.effort`", "Gemini", thinking_config, TEMPLATED,
               members=(*THINKING_BUDGETS, *THINKING_LEVELS)),
    translated("template_vars template_kwargs", "`chat_template_kwargs`", "TabbyAPI",
               to("chat_template_kwargs"), TEMPLATED),
    translated("continue_", "`continue_final_message`", "text-generation-webui", continued,
               ("chat",)),
    translated("reasoning", "`reasoning_effort`, `thinking_token_budget`, or as `thinking`",
               "OpenRouter", reasoning, ("chat",)),
    translated("reasoning_effort", "`reasoning.effort`", "chat", effort, ("responses",)),
    refused("prompt inputs", "send messages, in responses input", "text completions, TGI",
            endpoints=TEMPLATED),
    refused("messages", "send input, or use /v1/chat/completions", "chat",
            endpoints=("responses",)),
    refused("messages", "send prompt, or use /v1/chat/completions", "chat",
            endpoints=("completions",)),
    refused("input", "send messages, or use /v1/responses", "the Responses API",
            endpoints=("chat", "completions")),
    refused("system system_prompt instructions system_instruction",
            "send a message of role system", "Anthropic, Ollama, the Responses API",
            endpoints=("chat", "completions")),
    refused("system system_prompt system_instruction", "send instructions", "Anthropic",
            endpoints=("responses",)),
    refused("previous_response_id conversation", "use /v1/responses", "the Responses API",
            endpoints=("chat", "completions")),
    refused("prompt_token_ids input_ids token_data prompt_embeds input_embeds",
            "token ids are sent as prompt of /v1/completions", "vLLM, SGLang, Dynamo"),
    refused("use_raw_prompt raw", "use /v1/completions", "Dynamo, Ollama", quoted=True),
    refused("safe_prompt", "send a message of role system", "Mistral", quoted=True),
    refused("prompt_mode tool_prompt negative_prompt", "send a message of role system",
            "Mistral, TGI"),
    refused("preamble chat_history user_bio character greeting instruction_template "
            "instruction_template_str prompt_template chat_instruct_command bot_setting "
            "response_prefix role_mapping",
            "send messages; one of the assistant at the end is continued with prefix: true",
            "Cohere, text-generation-webui, TabbyAPI, MLX"),
    refused("transforms plugins search_parameters data_sources "
            "search_settings connectors cached_content",
            "prompts are not rewritten", "OpenRouter, xAI, Azure, Groq, Cohere, Gemini"),
    refused("web_search enable_search", "prompts are not rewritten", "OpenRouter, Qwen",
            quoted=True),
    refused("images image_data video_data audio_data videos", "only text is served",
            "SGLang, Ollama"),
    refused("template", "send chat_template, where the operator allows it", "Ollama"),
    refused("task session_params context", "send the whole conversation", "SGLang, Ollama"),
    refused("lora lora_path lora_request adapter_id adapters", "an adapter is requested as model",
            "llama.cpp, SGLang, TGI", (False, 0)),
    refused("prompt_name input_type pooling", "embeddings have one form", "TEI, vLLM",
            (True,), ("embeddings",)),
    refused("normalize", "embeddings have one form", "TEI, vLLM", (True,), ("embeddings",),
            quoted=True),
    translated("content", "`input`", "llama.cpp", to("input"), ("embeddings",), off=()),
    translated("content", "`prompt`", "llama.cpp", to("prompt"), ("tokenize",), off=()),
    translated("add_special", "`add_special_tokens`", "llama.cpp", to("add_special_tokens"),
               ("tokenize",)),
    translated("with_pieces", "`return_token_strs`", "llama.cpp", to("return_token_strs"),
               ("tokenize",)),
)  # fmt: skip
_SERVING = (
    refused("bootstrap_host bootstrap_port bootstrap_room ec_transfer_params lookahead_config",
            "there is no disaggregated serving", "SGLang, vLLM, TensorRT-LLM"),
    harmless("id_slot slot_id cache_prompt n_cache_reuse n_keep num_keep num_ctx num_batch "
             "num_thread num_gpu keep_alive",
             "the cache, its size and the context are the server's", "llama.cpp, Ollama"),
    harmless("routed_dp_rank data_parallel_rank disagg_prefill_dp_rank backend_instance_id "
             "agent_hints priority_jump",
             "there is one engine", "SGLang, Dynamo"),
    harmless("timings_per_token return_progress return_tokens response_fields annotations "
             "extra_fields details decoder_input_details return_hidden_states "
             "return_routed_experts routed_experts_start_len routed_experts_prompt_start "
             "return_cached_tokens_details return_meta_info return_prompt_text "
             "return_token_offsets return_mm_kwargs post_sampling_probs sse_ping_interval "
             "return_prompt_token_ids usage include_usage",
             "the answer has its usual members", "llama.cpp, SGLang, vLLM, TGI, Dynamo"),
    harmless("separate_reasoning stream_reasoning include_reasoning reasoning_format "
             "reasoning_split",
             "reasoning is returned as the server is set", "SGLang, vLLM, llama.cpp"),
    harmless("mm_processor_kwargs media_io_kwargs images_config use_audio_in_video "
             "max_dynamic_patch min_dynamic_patch",
             "only text is served", "vLLM, SGLang"),
    harmless("rid custom_params custom_labels ngram_corpus_id provider route models "
             "drop_params custom_llm_provider",
             "meant for a router or a log", "SGLang, OpenRouter, LiteLLM"),
)  # fmt: skip
TABLE: tuple[Row, ...] = (*_STRUCTURED, *_LIMITS, *_SAMPLING, *_PROMPT, *_SERVING)

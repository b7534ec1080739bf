"""What begins a call behind a tag or a bracket, and the form that each beginning has."""

from __future__ import annotations

from collections.abc import Callable

import regex

from chunkllama_server.api.tools.call_forms import CallForm, Functions, NamedCall
from chunkllama_server.api.tools.escaped_call import EscapedCall
from chunkllama_server.api.tools.parameter_call import ParameterCall
from chunkllama_server.api.tools.python_call import PythonCall

_NAME = r"(?P<name>[\w.\-]+)"
# Every form ends with a character that no other form has there, so that more text never changes the
# choice.
BEGINS = regex.compile(
    r"\s*(?:```[A-Za-z_]*\s*)?[\s\[]*(?:"
    r"(?P<json>\{)"
    rf"|(?P<parameters><function={_NAME}>|<(?:｜DSML｜)?invoke\s+name=\"{_NAME}\"\s*>"
    # Without parameters only the end of the call follows the name.
    rf"|{_NAME}\s*(?:<arg_key>|</tool_call>))"
    rf"|(?P<python>{_NAME}\()"
    rf"|(?P<escaped>call:\s*{_NAME}\{{)"
    rf"|(?P<named>(?:function<｜tool▁sep｜>)?{_NAME}(?::\d+)?\s*(?:\[CALL_ID\]\s*\w*\s*)?"
    r"(?:\[ARGS\]|<｜tool▁sep｜>|<\|tool_call_argument_begin\|>|<\|content\|>)?\s*"
    r"(?:```(?:json)?\s*)?\{)"
    r")"
)
LEAD = regex.compile(r"\s*(?:```[A-Za-z_]*\s+)?[\s\[]*")
FORMS: dict[str, Callable[[Functions, str, str], CallForm]] = {
    "parameters": ParameterCall,
    "python": PythonCall,
    "escaped": EscapedCall,
    "named": NamedCall,
}
# Tags that are the beginning of a call themselves.
CALL_TAGS = ("<function=", "<invoke name=", "<｜DSML｜invoke name=")

"""Client of an OpenAI-compatible endpoint: bounded concurrency, retries, answers stored by content.

An answer is stored under the digest of its request before it is used, complete or not at all: it is never asked for
again.
The requests are made in a thread with an event loop of its own, so that a program with a running loop (a notebook) can
use the client too.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Self

import aiohttp

from raybge.language_model.chat_question import ChatQuestion, InvalidAnswerError
from raybge.language_model.spec import KEY_VARIABLE, ChatSpec, api_key
from raybge.search.store import Store
from raybge.util.digest import digest
from raybge.util.errors import UserError, first_line
from raybge.util.filesystem import append_to_path
from raybge.util.retry import QUICK, WAITS

ANSWER_TRIES = 3  # requests until an answer has the requested form
LIMITED_TRIES = 60  # requests that the endpoint postpones (429 with Retry-After)
LONGEST_PAUSE = 3600.0  # seconds: an endpoint that asks for more stops the run, which continues later
UNAVAILABLE = 10  # questions in a row without any response, after all retries, that stop the run
MAX_BYTES = 10 << 20  # of a response
MAX_QUOTED = 200  # characters of the endpoint's message that an error quotes


class AnswerError(Exception):
    """There is no answer to a question, after all retries; other questions may have one."""


class _UnavailableError(Exception):
    """The endpoint gives no usable response at the moment.

    Args:
        message: the reason.
        pause: seconds after which the endpoint wants to be asked again; None if it does not say.
    """

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


class ChatClient:
    """Asks an endpoint for chat completions; a context manager.

    Args:
        spec: the endpoint.
        store: keeps the answers.
    """

    def __init__(self, spec: ChatSpec, store: Store) -> None:
        self._spec, self._store = spec, store
        self._url = append_to_path(spec.url, "/chat/completions")
        self._under_way: dict[str, asyncio.Task[Any]] = {}
        self._resume_at = 0.0  # time of the loop before which the endpoint wants no request
        self._unavailable = 0

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="chat client", daemon=True)
        self._thread.start()
        self._run(self._open()).result()
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def check(self) -> None:
        """Make one short request, to find out whether the endpoint accepts the key and the model.

        Raises:
            UserError: it does not, or does not answer.
        """
        self._run(self._check()).result()

    def submit(self, question: ChatQuestion) -> Future[Any]:
        """Ask a question.

        Args:
            question: the question.

        Returns:
            The valid answer, stored already. In its place AnswerError: there is none for this question; or UserError:
            the endpoint refuses all requests.
        """
        return self._run(self._answer_once(question))

    def _run(self, call: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    async def _open(self) -> None:
        key = api_key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = aiohttp.ClientTimeout(total=self._spec.timeout)
        self._session = aiohttp.ClientSession(headers=headers, timeout=timeout)
        self._slots = asyncio.Semaphore(self._spec.concurrency)

    async def _close(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()
        await self._loop.shutdown_default_executor()

    async def _check(self) -> None:
        question = ChatQuestion('Answer with the JSON object {"ready": true}.', {}, lambda _: True)
        pauses = list(WAITS[:QUICK])
        while True:
            try:
                await self._completion(self._body(question))
                return
            except InvalidAnswerError:  # the endpoint works; what its model answers to is seen later
                return
            except AnswerError as error:
                raise UserError(f"{self._spec.flag} {self._spec.url}: {error}") from None
            except _UnavailableError as error:
                if not pauses:
                    raise UserError(f"{self._spec.flag} {self._spec.url} does not answer: {error}") from None
                await asyncio.sleep(pauses.pop(0))

    async def _answer_once(self, question: ChatQuestion) -> Any:
        """Return the answer; equal questions at a time share one request."""
        body = self._body(question)
        name = digest("chat", self._spec.url, body)
        task = self._under_way.get(name)
        if task is None:
            task = self._under_way[name] = asyncio.create_task(self._stored_answer(name, body, question))
            task.add_done_callback(lambda _: self._under_way.pop(name))
        return await task

    def _body(self, question: ChatQuestion) -> dict[str, Any]:
        return {**self._spec.parameters, "model": self._spec.model, "messages": question.messages()}

    async def _stored_answer(self, name: str, body: dict[str, Any], question: ChatQuestion) -> Any:
        async with self._slots:
            if await asyncio.to_thread(self._store.has, name):
                with contextlib.suppress(ValueError):  # a file that a failing machine left empty is replaced
                    stored = await asyncio.to_thread(self._store.json, name)
                    if question.is_valid(stored):
                        return stored
            answer = await self._ask(body, question)
            await asyncio.to_thread(self._store.write_json, name, answer)
            return answer

    async def _ask(self, body: dict[str, Any], question: ChatQuestion) -> Any:
        """Return the answer to a request; it is repeated until there is one, a limited number of times."""
        pauses, invalid, limited = list(WAITS), 0, 0
        while True:
            while (wait := self._resume_at - self._loop.time()) > 0:
                await asyncio.sleep(wait)
            try:
                text = await self._completion(body)
                return question.answer(text)
            except InvalidAnswerError as error:
                invalid += 1
                if invalid == ANSWER_TRIES:
                    raise AnswerError(str(error)) from None
            except _UnavailableError as error:
                if error.pause is not None and limited < LIMITED_TRIES:
                    limited += 1
                    self._postpone(error.pause)
                elif pauses:
                    await asyncio.sleep(pauses.pop(0))
                else:
                    raise self._final_error(error) from None

    def _postpone(self, pause: float) -> None:
        """Make no request for some seconds: an endpoint's limit holds for all requests together."""
        if pause > LONGEST_PAUSE:
            raise UserError(
                f"{self._spec.flag} {self._spec.url}: the endpoint accepts no request for {pause:,.0f} seconds; start "
                "the same command later, it continues with the answers so far"
            )
        self._resume_at = max(self._resume_at, self._loop.time() + pause)

    def _final_error(self, error: _UnavailableError) -> Exception:
        """Return the error of a question without any response; a UserError if several in a row have none."""
        self._unavailable += 1
        if self._unavailable < UNAVAILABLE:
            return AnswerError(str(error))
        return UserError(
            f"{self._spec.flag} {self._spec.url} answered none of the last {UNAVAILABLE} questions: {error}; start the "
            "same command when it works again, it continues with the answers so far"
        )

    async def _completion(self, body: dict[str, Any]) -> str:
        """Make one request; return the model's text."""
        try:
            async with self._session.post(self._url, json=body, allow_redirects=False) as response:
                content = bytearray()
                async for chunk in response.content.iter_any():
                    content += chunk
                    if len(content) > MAX_BYTES:
                        raise AnswerError(f"the response is longer than {MAX_BYTES >> 20} MiB")
                status, pause = response.status, _retry_after(response.headers.get("Retry-After"))
        except TimeoutError:
            raise _UnavailableError(f"no answer within {self._spec.timeout:g} seconds") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _UnavailableError(self._quoted(first_line(error))) from None
        if status != 200:
            raise self._status_error(status, pause, bytes(content))
        try:
            choice = json.loads(content)["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _UnavailableError("the response is not a chat completion in OpenAI's format") from None
        self._unavailable = 0
        if reason == "length":
            raise InvalidAnswerError("the answer is cut off")
        if not isinstance(text, str):
            raise InvalidAnswerError("the answer has no text")
        return text

    def _status_error(self, status: int, pause: float | None, content: bytes) -> Exception:
        """Return the error of an HTTP status."""
        message = self._quoted(_error_message(content))
        reason = f"HTTP {status}{f', «{message}»' if message else ''}"
        if status in (408, 429) or status >= 500:
            return _UnavailableError(reason, pause if status in (429, 503) else None)
        self._unavailable = 0
        where = f"{self._spec.flag} {self._spec.url}"
        if status == 401:
            action = "check the key in" if api_key() else "set the key in"
            return UserError(f"{where}: the endpoint refuses the key ({reason}); {action} the variable {KEY_VARIABLE}")
        if status == 404:
            return UserError(
                f"{where}: the endpoint has no model {self._spec.model}, or there is none ({reason}); the URL ends "
                "before /chat/completions, often with /v1"
            )
        return AnswerError(f"the endpoint refuses the request ({reason})")

    def _quoted(self, text: str) -> str:
        """Return a short text of the endpoint's that is safe to print: without the key and control characters."""
        if key := api_key():
            text = text.replace(key, "…")
        text = "".join(character if character.isprintable() else " " for character in text)
        return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}…"


def _error_message(content: bytes) -> str:
    """Return the message of an error response, in one of the forms that servers use; "" if it has none."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(content)
        for field in ("error", "message"):
            value = value.get(field, value) if isinstance(value, dict) else value
        if isinstance(value, str):
            return value
    return ""


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which has seconds or a date; None for neither."""
    if value is None:
        return None
    try:
        if value.strip().isdigit():
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None

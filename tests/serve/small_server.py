"""A server with as much of the contract as the page uses, in one process with the test."""

import asyncio
import threading
import time
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from dyadlm.errors import UserError
from dyadlm.serve.watch import page_router, watch_router
from dyadlm.serve.watching import Watcher


class SmallServer:
    """models: by name, (model, tokenizer). key: asked for where there is one."""

    def __init__(self, models, key=None, port=0):
        self.models, self.key, self.port = models, key, port
        self.sessions = {}
        self.asked = []
        self.app = self._build()

    def __enter__(self):
        config = uvicorn.Config(self.app, host="127.0.0.1", port=self.port, log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join()

    def _record(self, own):
        watcher = own["watcher"]
        return {
            "id": own["id"],
            "name": own["name"],
            "model": own["model"],
            "tokens": watcher.tokens,
            "state_bytes": watcher.state.state_bytes() or 0,
            "created": own["created"],
            "used": own["used"],
            "expires": own["used"] + 3600,
            "place": own["place"],
            "parent": own["parent"],
            "tail": own["tail"],
        }

    def _new(self, model, name, parent=None):
        name_of = model or next(iter(self.models))
        if name_of not in self.models:
            raise Refused(404, f"There is no model {name_of!r}.")
        if name and any(own["name"] == name for own in self.sessions.values()):
            raise Refused(409, f"There is a session {name!r} already.")
        now = time.time()
        own = {
            "id": f"s{len(self.sessions)}-{time.monotonic_ns()}",
            "name": name,
            "model": name_of,
            "created": now,
            "used": now,
            "place": "memory",
            "parent": parent and parent["id"],
            "tail": "",
            "lock": asyncio.Lock(),
        }
        if parent is None:
            own["watcher"] = Watcher(*self.models[name_of])
        else:
            old = parent["watcher"]
            own["watcher"] = Watcher(
                old.model, old.tokenizer, old.state.copy(), old.logits, old.tokens, old.times, old.top
            )
            own["tail"] = parent["tail"]
        self.sessions[own["id"]] = own
        return own

    def _find(self, name):
        for own in self.sessions.values():
            if name in (own["id"], own["name"]):
                return own
        raise Refused(404, f"There is no session {name!r}.")

    @asynccontextmanager
    async def visit(self, request):
        if request.session is None:
            name = request.model or next(iter(self.models))
            yield Visited(Watcher(*self.models[name]), lambda: None)
            return
        own = self._find(request.session)
        async with own["lock"]:
            own["used"] = time.time()
            yield Visited(own["watcher"], lambda: self._record(own))

    def _build(self):
        app = FastAPI()

        @app.middleware("http")
        async def check(request: Request, call_next):
            self.asked.append((request.method, request.url.path))
            guarded = request.url.path.startswith(("/v1", "/tokenize"))
            if guarded and self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return JSONResponse(refusal("The key is missing or wrong."), 401)
            return await call_next(request)

        @app.exception_handler(Refused)
        async def refused(request, error):
            return JSONResponse(refusal(str(error)), error.status)

        @app.exception_handler(UserError)
        async def user_error(request, error):
            return JSONResponse(refusal(str(error)), 400)

        @app.get("/v1/models")
        async def models():
            data = []
            for name, (model, tokenizer) in self.models.items():
                ours = Watcher(model, tokenizer).ours
                count = sum(p.numel() for p in model.parameters())
                data.append({"id": name, "object": "model", "sessions": ours, "chat": False, "parameters": count})
            return {"object": "list", "data": data}

        @app.get("/v1/sessions")
        async def listed():
            return {"data": [self._record(own) for own in self.sessions.values()]}

        @app.post("/v1/sessions", status_code=201)
        async def create(body: dict):
            return self._record(self._new(body.get("model"), body.get("name")))

        @app.get("/v1/sessions/{name}")
        async def one(name: str):
            return self._record(self._find(name))

        @app.delete("/v1/sessions/{name}")
        async def delete(name: str):
            del self.sessions[self._find(name)["id"]]
            return {"deleted": True}

        @app.post("/v1/sessions/{name}/fork", status_code=201)
        async def fork(name: str, body: dict):
            parent = self._find(name)
            async with parent["lock"]:
                return self._record(self._new(parent["model"], body.get("name"), parent))

        @app.post("/v1/sessions/{name}/save")
        async def save(name: str):
            own = self._find(name)
            own["place"] = "disk"
            return self._record(own)

        @app.post("/tokenize")
        async def tokenize(body: dict):
            return {"tokens": self.models[body["model"]][1](body["text"])["input_ids"]}

        app.include_router(watch_router(self.visit))
        app.include_router(page_router())
        return app


class Visited:
    def __init__(self, watcher, settle):
        self.watcher, self.settle = watcher, settle


class Refused(Exception):
    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


def refusal(message):
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}

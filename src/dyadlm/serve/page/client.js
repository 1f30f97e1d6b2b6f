// Requests to the server. The key, where it asks for one, is kept in this tab alone.

const PLACE = "dyadlm-key";
// Seconds for which the server keeps what this tab needs alone, and what has a name (at most as long as it keeps any).
const UNNAMED = 6 * 3600, NAMED = 1e9;

export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export class Client {
  // askForKey: resolves to a key, when the server refuses the one there is.
  constructor(askForKey) {
    this.askForKey = askForKey;
    this.asking = null;
  }

  get key() {
    return sessionStorage.getItem(PLACE);
  }

  set key(key) {
    if (key) sessionStorage.setItem(PLACE, key);
    else sessionStorage.removeItem(PLACE);
  }

  async send(method, path, body, signal) {
    for (;;) {
      const used = this.key;
      const headers = {};
      if (used) headers.Authorization = `Bearer ${used}`;
      if (body !== undefined) headers["Content-Type"] = "application/json";
      const text = body === undefined ? undefined : JSON.stringify(body);
      const answer = await fetch(path, { method, headers, body: text, signal });
      if (answer.status === 401) {
        if (used !== this.key) continue; // another request has asked for it meanwhile
        this.asking ??= this.askForKey(Boolean(used)).finally(() => { this.asking = null; });
        this.key = await this.asking;
        continue;
      }
      if (!answer.ok) throw new Refusal(answer.status, await reason(answer));
      return answer;
    }
  }

  async ask(method, path, body) {
    return (await this.send(method, path, body)).json();
  }

  models() {
    return this.ask("GET", "/v1/models").then((found) => found.data);
  }

  sessions() {
    return this.ask("GET", "/v1/sessions").then((found) => found.data);
  }

  create(model) {
    return this.ask("POST", "/v1/sessions", { model, ttl: UNNAMED });
  }

  fork(session, name) {
    const body = name ? { name, ttl: NAMED } : { ttl: UNNAMED };
    return this.ask("POST", `/v1/sessions/${encodeURIComponent(session)}/fork`, body);
  }

  save(session) {
    return this.ask("POST", `/v1/sessions/${encodeURIComponent(session)}/save`);
  }

  remove(session) {
    return this.ask("DELETE", `/v1/sessions/${encodeURIComponent(session)}`);
  }

  tokenize(model, text) {
    return this.ask("POST", "/tokenize", { model, text }).then((found) => found.tokens);
  }

  // What the model does at each token, as it comes.
  async *watch(request, signal) {
    const answer = await this.send("POST", "/v1/watch", request, signal);
    for await (const event of events(answer.body)) {
      if (event.error) throw new Refusal(500, event.error.message);
      if (event.done) return;
      yield event;
    }
    throw new Refusal(500, "The server ended the stream early.");
  }
}

async function reason(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `The server answered ${answer.status} ${answer.statusText}.`;
  }
}

// Server-sent events of JSON.
async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      held += decoder.decode(value ?? new Uint8Array(), { stream: !done });
      const parts = held.split(/\r?\n\r?\n/);
      held = parts.pop();
      for (const part of parts) {
        const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
        if (data.length && data[0] !== "[DONE]") yield JSON.parse(data.join("\n"));
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

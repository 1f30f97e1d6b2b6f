// One text as a model has read and written it, and the sessions from which any moment of it can be taken up again.
//
// A session that is a mark never changes: what comes next is read by a fork of it, which becomes the next mark.

const MOST_MARKS = 6;

export class Future {
  // model: of the server. tokens: one event each. marks: {at, session}, by tokens. start, tail: what a session that was
  // opened had read before.
  constructor(client, model, { name = "Text", tokens = [], marks = [], start = 0, tail = "" } = {}) {
    Object.assign(this, { client, model, name, tokens: [], marks, start, tail });
    this.bits = 0; // of all tokens whose surprise is known
    this.known = 0;
    for (const event of tokens) this.take(event);
  }

  take(event) {
    this.tokens.push(event);
    if (event.bits === null) return;
    this.bits += event.bits;
    this.known += 1;
  }

  get length() {
    return this.tokens.length;
  }

  // Read text and write on; take(event) is called at each token. Where it is stopped, what came is kept.
  async go(request, take, signal) {
    const begun = this.length;
    const from = this.marks.at(-1);
    let session = null;
    try {
      const asked = { model: this.model.id, ...request };
      let skip = 0;
      if (this.model.sessions) {
        session = await this.session(from);
        asked.session = session;
      } else {
        // Without sessions everything is read again.
        const more = request.text ? await this.client.tokenize(this.model.id, request.text) : [];
        delete asked.text;
        asked.tokens = [...this.tokens.map((own) => own.token), ...more];
        skip = begun;
      }
      for await (const event of this.client.watch(asked, signal)) {
        if (event.index - this.start < skip) continue;
        this.take(event);
        take(event);
      }
      if (session) this.mark(this.length, session);
    } catch (error) {
      // The session may have read more than came here: stand at what came, from the mark before.
      if (this.model.sessions && this.length > begun) await this.stand(from);
      throw error;
    }
  }

  // A session that has read what a mark has, to go on with. Where the server has forgotten the mark, all is read again.
  async session(mark) {
    try {
      if (mark) return (await this.client.fork(mark.session)).id;
    } catch (error) {
      if (error.status !== 404 || this.start) throw error;
    }
    const { id } = await this.client.create(this.model.id);
    if (mark) await this.reread(id, this.tokens.slice(0, mark.at).map((own) => own.token));
    return id;
  }

  // Make a mark at the end, by reading what came since another one again.
  async stand(mark) {
    const session = await this.session(mark);
    const ids = this.tokens.slice(mark ? mark.at : 0).map((own) => own.token);
    await this.reread(session, ids);
    this.mark(this.length, session);
  }

  async reread(session, tokens) {
    const request = { model: this.model.id, session, tokens, quiet: true };
    for await (const _ of this.client.watch(request)) { /* nothing is told but the end */ }
  }

  mark(at, session) {
    this.marks.push({ at, session });
    if (this.marks.length > MOST_MARKS) this.marks.splice(this.nearest(), 1);
  }

  // The mark, neither first nor last, whose neighbours are nearest to each other.
  nearest() {
    let best = 1;
    for (let i = 1; i < this.marks.length - 1; i++) {
      const gap = (k) => this.marks[k + 1].at - this.marks[k - 1].at;
      if (gap(i) < gap(best)) best = i;
    }
    return best;
  }

  // This text up to so many tokens, which goes on by itself. Only what was read since the mark before is read again.
  async fork(at, name) {
    const marks = this.marks.filter((mark) => mark.at <= at);
    const tokens = this.tokens.slice(0, at);
    const { client, model, start, tail } = this;
    const twin = new Future(client, model, { name, tokens, marks, start, tail });
    const last = marks.at(-1);
    if (model.sessions && at && (!last || last.at < at)) await twin.stand(last);
    return twin;
  }
}

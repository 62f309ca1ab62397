// Publishes, and subscribes across lost connections. See clevrd.d.ts and docs/wire.md.

// Having lived this long, a connection resets the backoff.
const STEADY_MS = 10_000;
// A server that asks for more is mistaken.
const ASKED_CAP_MS = 300_000;
// Browsers hide the server's pings; who answers none of ours is gone.
const BEAT_MS = 25_000;

export class ClevrdError extends Error {
	constructor(sentence, fields) {
		super(sentence);
		Object.assign(this, { name: "ClevrdError" }, fields);
	}
}

export class Clevrd {
	#base;
	#options;

	constructor(url, options) {
		this.#base = url ? new URL(url, globalThis.location?.href) : new URL(".", import.meta.url);
		if (!/^http/.test(this.#base)) throw new TypeError("The URL must be http or https.");
		if (!this.#base.pathname.endsWith("/")) this.#base.pathname += "/";
		this.#options = { retryForMs: 60_000, WebSocket: globalThis.WebSocket, ...options };
	}

	async *subscribe(topic, { position, maxWaitingChars = 1e6, signal, onStatus, ...options } = {}) {
		const waiting = [];
		let chars = 0;
		let start, wake;
		const at = (offset) => ({ epoch: start.epoch, offset });
		const onEvent = (event, link, size) => {
			if (event.type === "error")
				link.end(event.code, !event.retryable && { failure: new ClevrdError(event.error, event) });
			if (event.type === "subscribed") {
				start = event;
				// What is not whole begins with its gap, or a cut between the two would hide it.
				if (event.recovered || !(position ?? options.since)) position = at(event.offset);
			}
			if (event.type && event.type !== "gap") return;
			const next = at(event.offset ?? event.to ?? start.offset);
			if (!event.type && next.epoch === position?.epoch && next.offset <= position.offset) return;
			position = next;
			waiting.push([{ type: "message", ...event, ...next }, size]);
			chars += size;
			// A WebSocket can't be paused: leave, and resume behind this when all is consumed.
			if (chars > maxWaitingChars) link.end("behind", { atOnce: true });
			wake?.();
		};
		const onOpen = (link) => {
			const resume = position && { ...position, last: null, since: null };
			link.send(JSON.stringify({ type: "subscribe", topic, ...options, ...resume }));
		};
		for await (const link of this.#links(signal, { onStatus, onOpen, onEvent })) {
			link.ended.then(() => wake?.());
			while (waiting.length || !link.ending) {
				if (!waiting.length) await new Promise((done) => (wake = done));
				if (signal?.aborted) return;
				for (const [event, size] of waiting.splice(0, 1)) {
					chars -= size;
					yield event;
				}
			}
		}
	}

	async publish(topic, data, { signal, ...options } = {}) {
		return this.#post("publish", encode({ topic, data, ...options }), signal);
	}

	async publishBatch(items, { signal } = {}) {
		return (await this.#post("publish/batch", Array.from(items, encode).join("\n"), signal)).results;
	}

	publishStream({ maxInFlight = 256, signal, onStatus } = {}) {
		const pending = new Map();
		const waiting = [];
		const closing = new AbortController();
		const ending = either(closing.signal, signal);
		let current, failure;
		let lastRef = 0;
		const fewerThan = async (count) => {
			while (pending.size >= count) await new Promise((done) => waiting.push(done));
		};
		const settle = (ref, how, value) => {
			pending.get(ref)[how](value);
			pending.delete(ref);
			// A place for one; after the last answer nothing else wakes the rest.
			for (const go of waiting.splice(0, pending.size ? 1 : maxInFlight)) go();
		};
		const onOpen = (link) => pending.forEach(({ text }) => link.send(text));
		const onEvent = (answer, link) => {
			const entry = pending.get(answer.ref);
			if (answer.success) settle(answer.ref, "resolve", answer);
			else if (!answer.retryable) settle(answer.ref, "reject", new ClevrdError(answer.error, answer));
			else pause(0, backoffMs(entry.tries++), ending).then(() => link.send(entry.text));
		};
		const run = async () => {
			for await (current of this.#links(ending, { onStatus, onOpen, onEvent })) await current.ended;
			throw ending.reason;
		};
		run().catch((error) => {
			failure = error;
			for (const ref of pending.keys()) settle(ref, "reject", error);
		});
		return {
			get ready() {
				return fewerThan(maxInFlight);
			},
			publish: async (topic, data, options) => {
				if (failure) throw failure;
				if (pending.size >= maxInFlight) throw new ClevrdError("Too many at once: await ready.");
				const text = encode({ type: "publish", topic, data, ...options, ref: ++lastRef });
				current?.send(text);
				return new Promise((resolve, reject) => {
					pending.set(lastRef, { text, tries: 0, resolve, reject });
				});
			},
			close: () => fewerThan(1).then(() => closing.abort()),
		};
	}

	// Yields connections; the next is asked for when one has ended.
	async *#links(signal, { onStatus, ...on }) {
		const tell = (status, more) => onStatus?.({ status, ...more });
		const url = this.#url("ws");
		let link;
		try {
			for (let tries = 0; !signal?.aborted; tries++) {
				tell("connecting");
				const socket = new this.#options.WebSocket(url.href.replace("http", "ws"), "clevrd.v1");
				link = connect(socket, signal, { tell, ...on });
				yield link;
				const { code, reason, atOnce, livedMs, failure } = link.ending;
				const range = Math.floor(code / 100);
				if (failure) throw failure;
				if (range === 40 || code === 1009)
					throw new ClevrdError(`Closed with ${code} (${reason}).`, { closeCode: code });
				if (atOnce || livedMs >= STEADY_MS) tries = 0;
				if (atOnce || (range === 42 && !tries)) continue;
				// Browsers hide why a handshake failed, so ask. 426: all else was well.
				if (livedMs === undefined)
					await this.#ask(url, { signal: either(AbortSignal.timeout(BEAT_MS), signal) }).catch((error) => {
						if (!error.retryable) throw error;
						link.askedMs = error.retryAfterMs;
					});
				await pause(link.askedMs, backoffMs(tries), signal);
			}
		} finally {
			link?.end();
			tell("closed");
		}
	}

	async #post(path, body, signal) {
		const ending = either(AbortSignal.timeout(this.#options.retryForMs), signal);
		for (let tries = 0; ; tries++) {
			try {
				return await this.#ask(this.#url(path), { method: "POST", body, signal: ending });
			} catch (error) {
				if (!error.retryable) throw error;
				await pause(error.retryAfterMs, backoffMs(tries), ending);
				if (ending.aborted) throw signal?.reason ?? error;
			}
		}
	}

	async #ask(url, init) {
		let response, answer;
		try {
			response = await fetch(url, init);
			answer = await response.json();
		} catch (cause) {
			// No JSON: not from clevrd, so the status has to do.
			if (!(cause instanceof SyntaxError))
				throw new ClevrdError(`No answer from ${url.host}.`, { cause, retryable: true });
		}
		const { ok, status, headers } = response;
		if (ok && answer) return answer;
		throw new ClevrdError(answer?.error ?? `Answered ${status}, but not by clevrd.`, {
			...answer,
			status,
			retryable: answer?.retryable || status >= 500 || [426, 429].includes(status),
			retryAfterMs: 1000 * headers.get("Retry-After") || 0,
		});
	}

	#url(path) {
		const url = new URL(path, this.#base);
		if (this.#options.tenant) url.searchParams.set("tenant", this.#options.tenant);
		return url;
	}
}

// One WebSocket. It ends once, and nothing is heard of it afterwards.
function connect(socket, signal, { tell, onOpen, onEvent }) {
	const stop = new AbortController();
	let isQuiet, openedMs;
	const link = {
		ended: new Promise((done) => (stop.signal.onabort = done)),
		send: (text) => socket.readyState === 1 && socket.send(text),
		end: (reason, how) => {
			if (link.ending) return;
			link.ending = { reason, livedMs: openedMs && performance.now() - openedMs, ...how };
			clearInterval(beat);
			stop.abort();
			socket.close();
			if (reason !== undefined) tell("waiting", link.ending);
		},
	};
	const beat = setInterval(() => {
		if (isQuiet || !openedMs) link.end("timeout");
		isQuiet = true;
		link.send('{"type":"ping"}');
	}, BEAT_MS);
	const on = (...rest) => listen(stop.signal, ...rest);
	on(socket, "open", () => {
		openedMs = performance.now();
		tell("open");
		onOpen(link);
	});
	on(socket, "message", ({ data }) => {
		isQuiet = false;
		try {
			const event = JSON.parse(data);
			if (event.type === "going_away") link.askedMs = event.reconnect_after_ms;
			else if (event.type !== "pong") onEvent(event, link, data.length);
		} catch (cause) {
			link.end("foreign", { failure: new ClevrdError("Not a clevrd server.", { cause }) });
		}
	});
	on(socket, "close error", ({ code = 1006, reason = "" }) => link.end(reason, { code }));
	// Now it may be dead and not know. Resuming is exact, so do.
	on(globalThis, "online resume", ({ type }) => link.end(type, { atOnce: true }));
	on(signal, "abort", () => link.end());
	return link;
}

// A wait of our own ends early when the network or the page is back.
const pause = (askedMs = 0, ownMs, signal) =>
	new Promise((done) => {
		const stop = new AbortController();
		const go = () => {
			clearTimeout(timer);
			stop.abort();
			done();
		};
		const timer = setTimeout(go, signal?.aborted ? 0 : Math.min(askedMs, ASKED_CAP_MS) + ownMs);
		if (!askedMs) listen(stop.signal, globalThis, "online pageshow visibilitychange", go);
		listen(stop.signal, signal, "abort", go);
	});

const listen = (signal, target, types, call) => {
	for (const type of types.split(" "))
		target?.addEventListener?.(type, call, { signal, capture: true });
};

const either = (...signals) => AbortSignal.any(signals.filter(Boolean));

// All of it is random: clients that were cut together don't come back together.
const backoffMs = (tries) => Math.random() * Math.min(30_000, 250 * 2 ** tries);

// The key tells a repetition. Plain http pages have no randomUUID().
const encode = ({ idempotencyKey, ...publish }) => {
	idempotencyKey ??= crypto.getRandomValues(new Uint32Array(4)).join("-");
	return JSON.stringify({ ...publish, idempotency_key: idempotencyKey });
};

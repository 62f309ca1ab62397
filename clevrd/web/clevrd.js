// Publishes, and subscribes across lost connections. The wire: docs/wire.md.

// One that lived this long resets the backoff.
const STEADY_MS = 10_000;
// Of what servers may ask for.
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
		this.#base = new URL(url || ".", url ? globalThis.location?.href : import.meta.url);
		if (!/^http/.test(this.#base)) throw new TypeError("The URL must be http or https.");
		if (!this.#base.pathname.endsWith("/")) this.#base.pathname += "/";
		check(options, "tenant retryForMs WebSocket");
		this.#options = { retryForMs: 60_000, WebSocket: globalThis.WebSocket, ...options };
	}

	async *subscribe(topic, given = {}) {
		check(given, "position positions patterns last since policy buffer signal onStatus maxWaitingChars");
		const { position, positions, patterns = [], last, since, signal, onStatus, maxWaitingChars, ...options } = given;
		const begin = { last, since };
		const known = new Map();
		for (const [name, at] of Object.entries(positions ?? { [topic]: position }))
			if (at) known.set(name, { epoch: at.epoch, offset: at.offset });
		// Found all there was: what is not known began since.
		const watched = new Set(known.size ? patterns : []);
		const starts = new Map();
		const onOpen = (link) => {
			const ask = (wish) => link.send(JSON.stringify({ type: "subscribe", ...options, ...wish }));
			// First: what a pattern has brought can't be named.
			for (const name of [topic].flat()) ask({ topic: name, ...(known.get(name) ?? begin) });
			const positions = Object.fromEntries(known);
			for (const pattern of patterns) {
				const isNew = !watched.has(pattern);
				ask({ pattern, ...(isNew && begin), positions: isNew && !known.size ? undefined : positions });
			}
		};
		for await (const event of this.#events(signal, { onStatus, onOpen, maxWaitingChars })) {
			const { type, topic, pattern } = event;
			if (type === "watching") watched.add(pattern);
			if (type === "forgotten") known.delete(topic);
			if (type === "subscribed") starts.set(topic, event);
			else if (type && type !== "gap") continue;
			const { epoch, offset } = starts.get(topic);
			const next = { epoch, offset: event.offset ?? event.to ?? offset };
			const at = known.get(topic);
			// What is not whole begins with its gap; a cut between must not hide it.
			if (event.recovered === false && (at || since || watched.has(pattern))) continue;
			if (epoch === at?.epoch && next.offset <= at.offset) continue;
			known.set(topic, next);
			if (type !== "subscribed") yield { type: "message", ...event, ...next };
		}
	}

	async publish(topic, data, { signal, ...options } = {}) {
		return this.#post("publish", encode({ topic, data, ...options }), signal);
	}

	async publishBatch(items, { signal } = {}) {
		return (await this.#post("publish/batch", Array.from(items, encode).join("\n"), signal)).results;
	}

	publishStream(options = {}) {
		check(options, "maxInFlight signal onStatus");
		const { maxInFlight = 256, signal, onStatus } = options;
		const pending = new Map();
		const waiting = [];
		const closing = new AbortController();
		const ending = either(closing.signal, signal);
		let lastRef = 0;
		let current, failure;
		const fewerThan = async (count) => {
			while (pending.size >= count) await new Promise((done) => waiting.push(done));
		};
		const onOpen = (link) => {
			current = link;
			pending.forEach(({ text }) => link.send(text));
		};
		const run = async () => {
			for await (const answer of this.#events(ending, { onStatus, onOpen }))
				pending.get(answer.ref)?.resolve(answer);
			throw ending.reason;
		};
		run().catch((error) => {
			failure = error;
			pending.forEach(({ reject }) => reject(error));
		});
		const publish = async (topic, data, options) => {
			if (pending.size >= maxInFlight) throw new ClevrdError("Too many at once: await ready.");
			const ref = ++lastRef;
			const text = encode({ type: "publish", topic, data, ...options, ref });
			try {
				for (let tries = 0; ; tries++) {
					if (failure) throw failure;
					current?.send(text);
					const answer = await new Promise((resolve, reject) => {
						pending.set(ref, { text, resolve, reject });
					});
					if (answer.success) return answer;
					await pause(new ClevrdError(answer.error, answer), tries, ending);
				}
			} finally {
				pending.delete(ref);
				// A place for one; after the last nothing else wakes the rest.
				for (const go of waiting.splice(0, pending.size ? 1 : maxInFlight)) go();
			}
		};
		return {
			get ready() {
				return fewerThan(maxInFlight);
			},
			publish,
			close: () => fewerThan(1).then(() => closing.abort()),
		};
	}

	// Of one connection after the other.
	async *#events(signal, { onStatus = () => {}, ...options }) {
		const url = this.#url("ws");
		let link;
		try {
			for (let tries = 0; !signal?.aborted; tries++) {
				onStatus({ status: "connecting" });
				const socket = new this.#options.WebSocket(url.href.replace("http", "ws"), "clevrd.v1");
				link = connect(socket, signal, { onStatus, ...options });
				for (let text; (text = (await link.texts.read()).value); ) {
					if (signal?.aborted) return;
					const event = heed(JSON.parse(text));
					link.askedMs ??= event.reconnect_after_ms;
					if (event.type !== "error" || event.ref) yield event;
					else if (event.retryable) link.end(event.code);
					else throw new ClevrdError(event.error, event);
				}
				const { code, reason, atOnce } = link.ending;
				if (atOnce || Date.now() - link.openedMs >= STEADY_MS) tries = 0;
				if (atOnce || (/^42/.test(code) && !tries)) continue;
				let lost = new ClevrdError(`Closed with ${code} (${reason}).`, {
					closeCode: code,
					retryable: !/^(40|1009)/.test(code),
					retryAfterMs: link.askedMs,
				});
				// Browsers hide why a handshake failed, so ask. 426: all else was well.
				if (!link.openedMs)
					await this.#ask(url, either(AbortSignal.timeout(BEAT_MS), signal)).catch((error) => (lost = error));
				await pause(lost, tries, signal);
			}
		} finally {
			link?.end();
			onStatus({ status: "closed" });
		}
	}

	async #post(path, body, signal) {
		const ending = either(AbortSignal.timeout(this.#options.retryForMs), signal);
		for (let tries = 0; ; tries++) {
			try {
				return await this.#ask(this.#url(path), ending, { method: "POST", body });
			} catch (error) {
				await pause(error, tries, ending);
				if (ending.aborted) throw signal?.reason ?? error;
			}
		}
	}

	async #ask(url, signal, init) {
		let response, answer;
		try {
			response = await fetch(url, { signal, ...init });
			answer = await response.json();
		} catch (cause) {
			// No JSON of clevrd's: the status has to do.
			if (!(cause instanceof SyntaxError))
				throw new ClevrdError(`No answer from ${url.host}.`, { cause, retryable: true });
		}
		const { ok, status, headers } = response;
		if (ok && answer) return heed(answer);
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

// One WebSocket, which ends once.
function connect(socket, signal, { onStatus, onOpen, maxWaitingChars = 1e6 }) {
	const stop = new AbortController();
	let isQuiet, inbox;
	const start = (it) => (inbox = it);
	const size = ({ length = 0 }) => length;
	const link = {
		texts: new ReadableStream({ start }, { highWaterMark: maxWaitingChars, size }).getReader(),
		send: (text) => socket.readyState === 1 && socket.send(text),
		end: (reason, how) => {
			if (link.ending) return;
			link.ending = { reason, ...how };
			clearInterval(beat);
			stop.abort();
			socket.close();
			inbox.close();
			if (reason != null) onStatus({ status: "waiting", ...link.ending });
		},
	};
	const beat = setInterval(() => {
		if (isQuiet || !link.openedMs) link.end("timeout");
		isQuiet = true;
		link.send('{"type":"ping"}');
	}, BEAT_MS);
	const on = listen.bind(null, stop.signal);
	on(socket, "open", () => {
		link.openedMs = Date.now();
		onStatus({ status: "open" });
		onOpen(link);
	});
	on(socket, "message", ({ data }) => {
		isQuiet = false;
		inbox.enqueue(data);
		// It can't be paused: leave, and resume when all is consumed.
		if (inbox.desiredSize < 0) link.end("behind", { atOnce: true });
	});
	on(socket, "close error", ({ code = 1006, reason = "" }) => link.end(reason, { code }));
	// Now it may be dead and not know. Resuming is exact, so do.
	on(globalThis, "online resume", ({ type }) => link.end(type, { atOnce: true }));
	on(signal, "abort", () => link.end());
	return link;
}

// Our own wait ends early when the network or the page is back.
const pause = async (error, tries, signal) => {
	if (!error.retryable) throw error;
	const askedMs = Math.min(error.retryAfterMs ?? 0, ASKED_CAP_MS);
	// All random: who was cut together does not come back together.
	const ownMs = Math.random() * Math.min(30_000, 250 * 2 ** tries);
	const stop = new AbortController();
	let timer;
	await new Promise((done) => {
		timer = setTimeout(done, signal?.aborted ? 0 : askedMs + ownMs);
		if (!askedMs) listen(stop.signal, globalThis, "online pageshow visibilitychange", done);
		listen(stop.signal, signal, "abort", done);
	});
	clearTimeout(timer);
	stop.abort();
};

const listen = (signal, target, types, call) => {
	for (const type of types.split(" "))
		target?.addEventListener?.(type, call, { signal, capture: true });
};

// What the server ignores, and finds misspelt.
const heed = (answer) => {
	for (const { warnings } of [answer, ...(answer.results ?? [])]) warnings?.forEach((each) => console.warn(each));
	return answer;
};

// A misspelt option would do nothing.
const check = (options, names) => {
	const known = names.split(" ");
	for (const name in options)
		for (const near of known)
			if (!known.includes(name) && isNear(fold(name), fold(near)))
				throw new TypeError(`${name} is no option, ${near} is.`);
};
const fold = (name) => name.replace(/[_-]/g, "").toLowerCase();
// One letter is wrong, missing or too many.
const isNear = (a, b) => {
	let at = 0;
	while (a[at] && a[at] === b[at]) at++;
	const fits = (m, n) => a.slice(at + m) === b.slice(at + n);
	return a === b || (b.length > 4 && (fits(1, 1) || fits(0, 1) || fits(1, 0)));
};

const either = (...signals) => AbortSignal.any(signals.filter(Boolean));

// The key tells a repetition. Plain http pages have no randomUUID().
const encode = ({ idempotencyKey, ...publish }) => {
	check(publish, "topic data key idempotencyKey signal");
	idempotencyKey ??= crypto.getRandomValues(new Uint32Array(4)).join("-");
	return JSON.stringify({ ...publish, idempotency_key: idempotencyKey });
};

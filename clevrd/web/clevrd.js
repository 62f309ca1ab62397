// Publishes, and subscribes across lost connections. The wire: docs/wire.md.

// Where the daemon's copy of this file came from: the daemon puts a line behind it that says so.
// Here it would keep bundlers that know no import.meta, as React Native's, from loading the file.
let home;

const PROTOCOL = "clevrd.v1";
// One that lived this long resets the backoff.
const STEADY_MS = 10_000;
// Of what servers may ask for.
const ASKED_CAP_MS = 300_000;
// Browsers hide the server's pings; who answers none of ours is gone.
const BEAT_MS = 25_000;
// Timers take no longer wait.
const MAX_TIMER_MS = 2 ** 31 - 1;
// Of the command that goes on by a fresh token, and of its answer.
const RENEWAL = "authenticate";
// A connection that lived this long until its token was over was a good one.
const STEADY_UNTIL_EXPIRED_MS = 500;
const EXPIRED = 4102;
// Of one answer: messages, topics, ids of readers.
const PAGE = 1000;
const PASS_ONE = "pass that of the package ws, new Clevrd(url, { WebSocket }).";

export class ClevrdError extends Error {
	constructor(sentence, fields) {
		super(sentence);
		Object.assign(this, { name: "ClevrdError" }, fields);
	}
}

export class Clevrd {
	#base;
	#host;
	#options;
	#token;

	constructor(url, options) {
		this.#base = baseOf(url);
		this.#host = this.#base.split("/")[2];
		const given = take(options, "tenant token retryForMs WebSocket");
		const { token, ...others } = given;
		this.#options = { retryForMs: 60_000, WebSocket: globalThis.WebSocket, ...others };
		this.#token = credentialOf(token);
	}

	subscribe(topic, options) {
		const leave = new AbortController();
		const events = this.#subscribe(topic, options, leave);
		// A generator is left only between two steps, so what it waits for has to end first.
		for (const way of ["return", "throw"]) {
			const step = events[way].bind(events);
			events[way] = (value) => {
				leave.abort();
				return step(value);
			};
		}
		return events;
	}

	async *#subscribe(topic, given, leave) {
		const all = take(
			given,
			"position positions patterns last since policy buffer subscriberId headers signal onStatus maxWaitingChars",
			FLAGS,
		);
		const { position, positions, patterns = [], last, since, signal, onStatus, maxWaitingChars, ...options } = all;
		const topics = topicsOf(topic, all);
		const begin = { last, since };
		const known = new Map();
		for (const [name, at] of Object.entries(positions ?? (position && { [topics[0]]: position }) ?? {}))
			if (at) known.set(name, { epoch: at.epoch, offset: at.offset });
		// Found all there was: what is not known began since.
		const watched = new Set(known.size ? patterns : []);
		const starts = new Map();
		const ask = (wish) => json(onWire({ type: "subscribe", ...options, ...wish }));
		// What has no JSON is refused before there is a connection.
		ask();
		const onOpen = (link) => {
			starts.clear();
			// First: what a pattern has brought can't be named.
			for (const name of topics) link.send(ask({ topic: name, ...(known.get(name) ?? begin) }));
			const positions = Object.fromEntries(known);
			for (const pattern of patterns) {
				const isNew = !watched.has(pattern);
				const resume = { positions: isNew && !known.size ? undefined : positions };
				link.send(ask({ pattern, ...(isNew && begin), ...resume }));
			}
		};
		for await (const event of this.#events(leave, { signal, onStatus, onOpen, maxWaitingChars })) {
			const { type, topic, pattern, epoch: named } = event;
			if (type === "watching") watched.add(pattern);
			if (type === "forgotten") {
				known.delete(topic);
				starts.delete(topic);
			}
			if (type === "subscribed") {
				if (typeof topic !== "string" || !isPosition(event)) throw this.#foreign();
				starts.set(topic, { epoch: named, offset: event.offset });
			} else if (type && type !== "gap") continue;
			const start = starts.get(topic);
			const next = { ...start, offset: event.offset ?? event.to ?? start?.offset };
			if (!isPosition(next)) throw this.#foreign();
			const at = known.get(topic);
			// What is not whole begins with its gap; a cut between must not hide it.
			if (event.recovered === false && (at || since || watched.has(pattern))) continue;
			if (next.epoch === at?.epoch && next.offset <= at.offset) continue;
			known.set(topic, next);
			if (type !== "subscribed") yield { type: "message", ...event, ...next };
		}
	}

	async publish(topic, data, options) {
		const { signal, ...rest } = take(options, `${PUBLISH} signal`);
		const answer = await this.#post("publish", encode({ ...rest, topic, data }), signal);
		if (!isAnswer(answer)) throw this.#foreign();
		return answer;
	}

	async publishBatch(items, options) {
		const { signal } = take(options, "signal");
		if (typeof items?.[Symbol.iterator] !== "function")
			throw new TypeError("The items must be an array, as [{ topic, data }].");
		const lines = Array.from(items, (item) => encode(take(item, `topic data ${PUBLISH}`)));
		const { results } = await this.#post("publish/batch", lines.join("\n"), signal, "x-ndjson");
		const isWhole = listOf(results).length === lines.length;
		if (!isWhole || !results.every((each) => isAnswer(each) || isRefusal(each))) throw this.#foreign();
		return results;
	}

	async *history(topic, options) {
		const given = take(options, "position last since limit headers signal", FLAGS);
		const { position, last, since, limit = Infinity, headers, signal } = given;
		checkBegin(given);
		const path = pathOf(topic);
		let left = limit;
		let from = "last" in given ? { last } : { since: since?.toJSON?.() ?? since ?? "all" };
		if (position) from = { epoch: position.epoch, offset: position.offset };
		// What is the newest when it begins: a topic may grow faster than it is read.
		for (let head; left; ) {
			head ??= await this.#get(path, { limit: 1 }, isPosition, signal);
			const query = { ...from, limit: Math.min(left, PAGE), headers };
			const { messages, gap, epoch, offset } = await this.#get(`${path}/messages`, query, isPage, signal);
			const events = messages.map((message) => ({ type: "message", ...message, epoch }));
			if (gap) events.unshift({ ...gap, epoch, offset: (messages[0]?.offset ?? offset + 1) - 1 });
			for (const event of events) {
				if (signal?.aborted) throw reasonOf(signal);
				yield event;
			}
			if (!events.length) return;
			left -= messages.length;
			from = { epoch, offset };
			if (head.epoch !== epoch) head = undefined;
			else if (offset >= head.offset) return;
		}
	}

	async *topics(options) {
		const { signal } = take(options, "signal");
		for (let after; after !== null; ) {
			const page = await this.#get("topics", { after, limit: PAGE }, isTopics, signal);
			yield* page.topics;
			after = page.next;
		}
	}

	async topic(topic, options) {
		const { limit = PAGE, after, signal } = take(options, "limit after signal");
		return this.#get(pathOf(topic), { limit, after }, isPosition, signal);
	}

	async clear(topic, options) {
		const { signal } = take(options, "signal");
		// Once: another time it would clear what was published meanwhile.
		const init = { method: "DELETE", is: isPosition, once: true };
		const { epoch, offset } = await this.#persist(`${pathOf(topic)}/messages`, signal, init);
		return { epoch, offset };
	}

	publishStream(options) {
		const { maxInFlight = 256, signal, onStatus } = take(options, "maxInFlight signal onStatus");
		const pending = new Map();
		const waiting = [];
		const stop = new AbortController();
		let lastRef = 0;
		let current, failure, isTold;
		const fewerThan = async (count) => {
			while (pending.size >= count) await new Promise((done) => waiting.push(done));
		};
		const onOpen = (link) => {
			current = link;
			pending.forEach(({ text }) => link.send(text));
		};
		const run = async () => {
			for await (const { type, ref, ...answer } of this.#events(stop, { signal, onStatus, onOpen })) {
				if (pending.has(ref) && type !== "error" && !isAnswer(answer)) throw this.#foreign();
				pending.get(ref)?.resolve(answer);
			}
			throw signal?.aborted ? reasonOf(signal) : new ClevrdError("The stream is closed.");
		};
		const done = run().catch((error) => {
			failure = error;
			stop.abort();
			pending.forEach(({ reject }) => reject(error));
		});
		const send = async (topic, data, options) => {
			const given = take(options, `topic data ${PUBLISH}`);
			if (pending.size >= maxInFlight) throw new ClevrdError("Too many at once: await ready.");
			const ref = ++lastRef;
			const text = encode({ ...given, type: "publish", topic, data, ref });
			try {
				for (let tries = 0; ; tries++) {
					if (failure) throw failure;
					current?.send(text);
					const answer = await new Promise((resolve, reject) => {
						pending.set(ref, { text, resolve, reject });
					});
					if (isAnswer(answer)) return answer;
					await pause(refusal(answer, "The message was refused."), tries, stop.signal);
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
			publish(...message) {
				const sent = send(...message);
				// Who looks at it only later, or never, must not end a Node process.
				sent.catch((error) => {
					if (!isTold && !signal?.aborted) console.warn(`A message was not published: ${error.message}`);
					isTold = true;
				});
				return sent;
			},
			async close() {
				await fewerThan(1);
				stop.abort();
				await done;
			},
		};
	}

	// Of one connection after the other, until `stop` aborts.
	async *#events(stop, { signal, onStatus, ...options }) {
		let link, secret, failure;
		// What the application's callbacks throw is thrown to it, by the loop.
		const fail = (error) => {
			failure ??= { error };
			stop.abort();
		};
		const say = (status) => {
			try {
				onStatus?.(status)?.then?.(undefined, fail);
			} catch (error) {
				fail(error);
			}
		};
		const isLeft = () => stop.signal.aborted;
		const renew = (link, leastMs = 0) => {
			const waitMs = link.ending ? undefined : this.#token.waitMs(secret);
			if (waitMs === undefined) return;
			link.renewing = setTimeout(async () => {
				const old = secret;
				try {
					const got = await this.#token.get(stop.signal, old);
					// The next connection has a secret of its own by now.
					if (link.ending) return;
					secret = got;
					const isNew = secret.text !== old.text;
					if (isNew) link.send(json({ type: RENEWAL, token: secret.text, ref: RENEWAL }));
					renew(link, isNew ? 0 : 1000);
				} catch (error) {
					// Once it is over, the next connection asks again.
					if (!isLeft()) notRenewed(error.message);
					renew(link, 1000);
				}
			}, Math.max(waitMs, leastMs));
		};
		const unlisten = listen(signal, "abort", () => stop.abort());
		if (signal?.aborted) stop.abort();
		try {
			// React's strict mode leaves at once and comes again: for that open nothing.
			await null;
			for (let tries = 0; !isLeft(); tries++) {
				say({ status: "connecting" });
				if (isLeft()) break;
				try {
					secret = await this.#token.get(stop.signal);
				} catch (error) {
					if (error.retryable && !isLeft()) say({ status: "waiting", reason: "token" });
					await pause(error, tries, stop.signal);
					continue;
				}
				if (isLeft()) break;
				link = connect(this.#socket(secret), stop.signal, { say, fail, renew, ...options });
				for (let text; (text = await link.read()) !== undefined; ) {
					if (isLeft()) return;
					const event = this.#eventOf(text);
					if (event.reconnect_after_ms >= 0) link.askedMs ??= event.reconnect_after_ms;
					if (event.ref === RENEWAL) event.type === "error" && notRenewed(event.error);
					else if (event.type !== "error" || event.ref) yield event;
					else if (event.retryable) link.end(event.code ?? "error");
					else throw refusal(event, "The server refused it.");
				}
				if (isLeft()) return;
				const { code, reason, atOnce, isForeign } = link.ending;
				if (isForeign) throw this.#foreign();
				const isExpired = code === EXPIRED;
				if (isExpired) this.#token.drop(secret);
				const steadyMs = isExpired ? STEADY_UNTIL_EXPIRED_MS : STEADY_MS;
				if (atOnce || Date.now() - link.openedMs >= steadyMs) tries = 0;
				if (atOnce || ((isExpired || /^42/.test(code)) && !tries)) continue;
				let lost = new ClevrdError(`Closed with ${code} (${reason}).`, {
					closeCode: code,
					retryable: !/^(40|1009)/.test(code),
					retryAfterMs: link.askedMs,
				});
				// Browsers hide why a handshake failed, so ask. 426: all else was well.
				if (!link.openedMs) lost = (await this.#whyNot(stop.signal)) ?? lost;
				if (!isLeft()) await pause(lost, tries, stop.signal);
			}
		} finally {
			unlisten();
			link?.end();
			say({ status: "closed" });
			if (failure) throw failure.error;
		}
	}

	#socket(secret) {
		const { WebSocket } = this.#options;
		if (!WebSocket) throw new TypeError(`There is no WebSocket here: ${PASS_ONE}`);
		try {
			const protocols = secret ? [PROTOCOL, `clevrd.bearer.${base64Url(secret.text)}`] : PROTOCOL;
			return new WebSocket(this.#url("ws").replace("http", "ws"), protocols);
		} catch (cause) {
			throw new ClevrdError(`No WebSocket to ${this.#host} can be made: ${cause?.message ?? cause}`, { cause });
		}
	}

	#eventOf(text) {
		let event;
		try {
			event = JSON.parse(text);
		} catch {
			// Not ours, like all that is no object.
		}
		if (!isObject(event)) throw this.#foreign();
		return event.type ? heed(event) : event;
	}

	async #whyNot(signal) {
		const ending = within(BEAT_MS, signal);
		try {
			await this.#ask("ws", ending.signal);
			return this.#foreign();
		} catch (error) {
			return error;
		} finally {
			ending.end();
		}
	}

	#post(path, body, signal, type = "json") {
		// Browsers ask first whether a page of another origin may send these.
		const headers = { "Content-Type": `application/${type}` };
		return this.#persist(path, signal, { method: "POST", body, headers });
	}

	#get(path, query, is, signal) {
		return this.#persist(path, signal, { query, is });
	}

	// Asks, and again while time may heal it.
	async #persist(path, signal, init) {
		const { retryForMs } = this.#options;
		const ending = within(retryForMs || BEAT_MS, signal);
		try {
			for (let tries = 0; ; tries++) {
				try {
					return await this.#ask(path, ending.signal, init);
				} catch (error) {
					if (signal?.aborted) throw reasonOf(signal);
					if (!retryForMs || init.once) throw error;
					await pause(error, tries, ending.signal);
					if (ending.signal.aborted) throw signal?.aborted ? reasonOf(signal) : error;
				}
			}
		} finally {
			ending.end();
		}
	}

	async #ask(path, signal, init, refused) {
		const { query, is = isToldOf, ...rest } = init ?? {};
		let response, answer;
		const secret = await this.#token.get(signal, refused);
		const headers = { ...rest.headers, ...(secret && { Authorization: `Bearer ${secret.text}` }) };
		try {
			response = await fetch(this.#url(path, query), { signal, ...rest, headers });
			answer = await response.json();
		} catch (cause) {
			// JSON that is none was cut; Chromium hands out what came. Else it is not clevrd's.
			const isWhole = cause?.name === "SyntaxError" && !/json/.test(response.headers.get("Content-Type"));
			if (!isWhole && response?.headers.get("Content-Length") !== "0")
				throw new ClevrdError(`No answer from ${this.#host}.`, { cause, retryable: true });
		}
		const { ok, status } = response;
		// A fresh one may do, once.
		if (status === 401 && this.#token.drop(secret) && !refused) return this.#ask(path, signal, init, secret);
		if (ok && is(answer)) return heed(answer);
		const error = refusal(answer, `${this.#host} answered ${status}, but is no clevrd: check the URL.`);
		// 426 is clevrd's only with its JSON: every WebSocket server says it.
		const isBusy = status >= 500 || status === 429 || (status === 426 && isObject(answer));
		const retryAfterMs = 1000 * response.headers.get("Retry-After") || 0;
		throw Object.assign(error, { status, retryable: error.retryable || isBusy, retryAfterMs });
	}

	#url(path, query) {
		const given = Object.entries({ tenant: this.#options.tenant, ...query }).filter(([, value]) => !isNone(value));
		const text = given.map(([name, value]) => `${name}=${encodeURIComponent(value)}`).join("&");
		return this.#base + path + (text && `?${text}`);
	}

	#foreign() {
		return new ClevrdError(`${this.#host} sends what clevrd does not: check the URL.`, { retryable: false });
	}
}

// One WebSocket, which ends once. Its listeners stay: the package ws calls them after it was closed,
// and throws an error that nobody listens to.
function connect(socket, signal, { say, fail, renew, onOpen, maxWaitingChars = 1e6 }) {
	let arrived = [];
	let taken = [];
	let waitingChars = 0;
	let isQuiet, wake, beat;
	const unlisten = [];
	// What a class that is no WebSocket's throws, wherever it does.
	const attempt = (call) => {
		try {
			call();
		} catch (cause) {
			const sentence = `The WebSocket does not work as one (${cause?.message ?? cause}): ${PASS_ONE}`;
			fail(new ClevrdError(sentence, { cause, retryable: false }));
			link.end();
		}
	};
	const link = {
		// The next text; undefined when all is read and no more comes.
		async read() {
			while (!taken.length && !arrived.length && !link.ending) await new Promise((done) => (wake = done));
			if (!taken.length) [taken, arrived] = [arrived.reverse(), taken];
			const text = taken.pop();
			waitingChars -= text?.length ?? 0;
			return text;
		},
		send: (text) => attempt(() => socket.readyState === 1 && socket.send(text)),
		end: (reason, how) => {
			if (link.ending) return;
			link.ending = { reason, ...how };
			clearInterval(beat);
			clearTimeout(link.renewing);
			unlisten.forEach((each) => each());
			try {
				socket.close();
			} catch {
				// It is closed then.
			}
			wake?.();
			if (reason != null) say({ status: "waiting", reason, ...(how?.code && { code: how.code }) });
		},
	};
	const calls = {
		// First: the package ws throws it when what is refused below is closed. Behind an open
		// connection's error comes its close, which says more.
		error: () => link.openedMs || link.end("", { code: 1006 }),
		open() {
			// Its server would have chosen the protocol.
			if (socket.protocol === "") return link.end(null, { isForeign: true });
			link.openedMs = Date.now();
			say({ status: "open" });
			onOpen(link);
			renew(link);
		},
		message({ data }) {
			isQuiet = false;
			// No frame of clevrd's is binary, and no text of clevrd's is empty.
			const text = typeof data === "string" ? data : "";
			arrived.push(text);
			waitingChars += text.length;
			wake?.();
			if (!text) link.end();
			// It can't be paused: leave, and resume when all is consumed.
			else if (waitingChars > maxWaitingChars) link.end("behind", { atOnce: true });
		},
		close: ({ code = 1006, reason = "" }) => link.end(reason, { code }),
	};
	attempt(() => {
		for (const type in calls)
			socket.addEventListener(type, (event) => link.ending || attempt(() => calls[type](event)));
		for (const name of ["send", "close", "readyState"])
			if (isNone(socket[name])) throw new TypeError(`it has no ${name}`);
	});
	if (signal.aborted) link.end();
	// Only now, so that what has ended already leaves nothing behind.
	if (link.ending) return link;
	unlisten.push(
		// Now it may be dead and not know. Resuming is exact, so do.
		listen(globalThis, "online resume", ({ type }) => link.end(type, { atOnce: true })),
		listen(signal, "abort", () => link.end()),
	);
	beat = setInterval(() => {
		if (isQuiet || !link.openedMs) return link.end("timeout");
		isQuiet = true;
		link.send('{"type":"ping"}');
	}, BEAT_MS);
	return link;
}

// What is shown to the server: a text, or what a function returns, which is asked again in time.
const credentialOf = (token) => {
	if (!isFunction(token)) return { get: async () => token && { text: token }, waitMs() {}, drop() {} };
	let kept, asking;
	const ask = async () => {
		let text;
		try {
			text = await token();
		} catch (cause) {
			throw new ClevrdError("The token function failed.", { cause, retryable: true });
		}
		if (!isSecret(text)) throw new TypeError(`The token function must return ${SECRET}.`);
		const lifeMs = lifeOf(text);
		return (kept = { text, renewMs: Date.now() + renewalMs(lifeMs), overMs: Date.now() + lifeMs });
	};
	return {
		// Another one than `old`, whose time is nearly over or which was refused.
		async get(signal, old) {
			if (kept && kept !== old && Date.now() < kept.renewMs) return kept;
			if (!asking) {
				const one = ask().finally(() => asking === one && (asking = undefined));
				asking = one;
			}
			const asked = asking;
			const ending = within(BEAT_MS, signal);
			let unlisten;
			try {
				return await new Promise((done, fail) => {
					const give = () => {
						// Whoever comes next asks again, and not for an answer that may never come.
						if (!signal?.aborted && asking === asked) asking = undefined;
						fail(new ClevrdError("The token function did not answer.", { retryable: true }));
					};
					unlisten = listen(ending.signal, "abort", give);
					asked.then(done, fail);
					if (ending.signal.aborted) give();
				});
			} finally {
				unlisten();
				ending.end();
			}
		},
		// Until another one is to be shown; undefined where nothing is to be waited for.
		waitMs(secret) {
			const leftMs = secret.overMs - Date.now();
			if (leftMs > 0 && leftMs < Infinity)
				return Math.min(renewalMs(leftMs) * (1 - Math.random() / 10), MAX_TIMER_MS);
		},
		drop(secret) {
			if (kept === secret) kept = undefined;
			return true;
		},
	};
};

// At 80 % of the life, 5 s before its end at least, and never in its first half.
const renewalMs = (lifeMs) => Math.min(0.8 * lifeMs, Math.max(lifeMs - 5000, lifeMs / 2));

// As a token says it, unverified; without an end, or of a key: for ever. Where the clock here is
// wrong, the whole life.
const lifeOf = (text) => {
	try {
		const { exp, iat } = JSON.parse(atob(text.split(".")[1].replace(/-/g, "+").replace(/_/g, "/")));
		if (typeof exp !== "number") return Infinity;
		const left = exp - Date.now() / 1000;
		const whole = exp - iat;
		return 1000 * Math.max(0, (left > 0 && !(left > whole) ? left : whole) || 0);
	} catch {
		return Infinity;
	}
};

const base64Url = (text) => btoa(text).replace(/\+/g, "-").replace(/\//g, "_").replace(/=/g, "");

const notRenewed = (why) => console.warn(`The token was not renewed: ${why}`);

// Our own wait ends early when the network or the page is back.
const pause = async (error, tries, signal) => {
	if (!error.retryable) throw error;
	if (signal.aborted) return;
	const askedMs = Math.min(error.retryAfterMs ?? 0, ASKED_CAP_MS);
	// All random: who was cut together does not come back together.
	const ownMs = Math.random() * Math.min(30_000, 250 * 2 ** tries);
	let timer;
	const unlisten = [];
	await new Promise((done) => {
		if (!askedMs) unlisten.push(listen(globalThis, "online pageshow visibilitychange", done));
		unlisten.push(listen(signal, "abort", done));
		timer = setTimeout(done, askedMs + ownMs);
	});
	clearTimeout(timer);
	unlisten.forEach((each) => each());
};

// Returns what ends it: { signal } is unknown to React Native, among others, `true` to Node's remove.
const listen = (target, types, call) => {
	const each = (way) => types.split(" ").forEach((type) => target?.[way]?.(type, call, { capture: true }));
	each("addEventListener");
	return () => each("removeEventListener");
};

// A signal that also aborts when the time is up.
const within = (ms, signal) => {
	const stop = new AbortController();
	const abort = () => stop.abort();
	const unlisten = listen(signal, "abort", abort);
	const timer = setTimeout(abort, ms);
	if (signal?.aborted) abort();
	const end = () => {
		clearTimeout(timer);
		unlisten();
	};
	return { signal: stop.signal, end };
};

const reasonOf = (signal) => signal.reason ?? new ClevrdError("It was aborted.");

// What the server says of a refusal, as far as it is what the contract says.
const refusal = (answer, otherwise) => {
	const { error, code, retryable } = isObject(answer) ? answer : {};
	const isTold = typeof error === "string" && error;
	return new ClevrdError(isTold ? error : otherwise, {
		code: typeof code === "string" ? code : undefined,
		retryable: retryable === true,
	});
};

// What the server ignores, and finds misspelt.
const heed = (answer) => {
	for (const each of [answer, ...listOf(answer.results)]) listOf(each?.warnings).forEach((text) => console.warn(text));
	return answer;
};
const listOf = (value) => (Array.isArray(value) ? value : []);

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const isFunction = (value) => typeof value === "function";
// What `new` takes, without calling it.
const isClass = (value) => {
	try {
		return !!Reflect.construct(Object, [], value);
	} catch {
		return false;
	}
};
const isText = (value) => typeof value === "string" && value !== "";
const isSecret = (value) => typeof value === "string" && /^[!-~]{1,5600}$/.test(value);
const isWholeFrom = (least) => (value) => Number.isSafeInteger(value) && value >= least;
const isPosition = (value) => isObject(value) && isText(value.epoch) && isWholeFrom(0)(value.offset);
const isAnswer = (value) => isPosition(value) && value.success === true && isText(value.message_id);
const isRefusal = (value) => isObject(value) && value.success === false && isText(value.error);
const isToldOf = (value) => typeof value?.success === "boolean";
const isListOf = (is) => (value) => Array.isArray(value) && value.every(is);
const areMessages = isListOf((each) => isWholeFrom(1)(each?.offset));
const isPage = (value) => isPosition(value) && areMessages(value.messages);
const isTexts = isListOf(isText);
const isTopics = (value) => isListOf(isPosition)(value?.topics) && (value.next === null || isText(value.next));
const isNone = (value) => value === undefined || value === null;

// What the options of all calls must be: as a test, and in words.
const text = [isText, "text, and not empty"];
const callback = [isFunction, "a function"];
const SECRET = "1 to 5,600 visible ASCII characters, without spaces";
const fromOne = [isWholeFrom(1), "a whole number, 1 or more"];
const OPTIONS = {
	tenant: [(value) => isText(value) && /^[\w.-]{1,64}$/.test(value), "a name of 1 to 64 of A-Z a-z 0-9 . _ -"],
	token: [(value) => isFunction(value) || isSecret(value), `${SECRET}, or a function that returns them`],
	retryForMs: [(value) => value >= 0 && value <= MAX_TIMER_MS && typeof value === "number", `a number from 0 to ${MAX_TIMER_MS}`],
	WebSocket: [isClass, "a class, as that of the package ws"],
	position: [isPosition, "{ epoch, offset }, as every event has them"],
	positions: [
		(value) => isObject(value) && Object.values(value).every((each) => isNone(each) || isPosition(each)),
		"positions by topic, as { orders: { epoch, offset } }",
	],
	patterns: [isTexts, 'an array of texts, as ["orders.*"]'],
	last: [isWholeFrom(0), "a whole number, 0 or more"],
	since: [(value) => isText(value) || value.getTime?.() >= 0, 'text, as "90s" or "all", or a Date'],
	policy: text,
	buffer: fromOne,
	subscriberId: text,
	limit: fromOne,
	after: text,
	signal: [(value) => isFunction(value.addEventListener) && "aborted" in value, "an AbortSignal, as the signal of an AbortController"],
	onStatus: callback,
	maxWaitingChars: fromOne,
	maxInFlight: fromOne,
	key: text,
	idempotencyKey: text,
	headers: [
		(value) =>
			isObject(value) &&
			Object.entries(value).every(([name, each]) => /^(trace(parent|state)$|ce-)/.test(name) && typeof each === "string"),
		'an object of texts with names traceparent, tracestate and ce-*, as { "ce-type": "order.paid" }',
	],
	ttlS: [
		(value) => typeof value === "number" && value >= 0.001 && value <= 1e8,
		"a number of seconds from 0.001 to 100000000; leave it out for a message that does not expire",
	],
};
// Options of each publish, and what they are called on the wire.
const PUBLISH = "key idempotencyKey ttlS headers";
// Where an option says whether headers are wanted, not which they are.
const FLAGS = { headers: [(value) => typeof value === "boolean", "true or false"] };
const onWire = ({ idempotencyKey, ttlS, subscriberId, ...rest }) => ({
	...rest,
	idempotency_key: idempotencyKey,
	ttl_s: ttlS,
	subscriber_id: subscriberId,
});

// Returns the options that are given, as they must be. A misspelt one would do nothing.
const take = (options = {}, names, own) => {
	if (!isObject(options)) throw new TypeError(`An object is expected, with any of: ${names.replaceAll(" ", ", ")}.`);
	const known = names.split(" ");
	const given = {};
	for (const name in options) {
		const value = options[name];
		for (const near of known)
			if (!known.includes(name) && isNear(fold(name), fold(near)))
				throw new TypeError(`${name} is no option, ${near} is.`);
		if (isNone(value)) continue;
		const [is, words] = (known.includes(name) && (own?.[name] ?? OPTIONS[name])) || [];
		if (is && !is(value)) throw new TypeError(`${name} must be ${words}.`);
		given[name] = value;
	}
	return given;
};
const fold = (name) => name.replace(/[_-]/g, "").toLowerCase();
// One letter is wrong, missing or too many.
const isNear = (a, b) => {
	let at = 0;
	while (a[at] && a[at] === b[at]) at++;
	const fits = (m, n) => a.slice(at + m) === b.slice(at + n);
	return a === b || (b.length > 4 && (fits(1, 1) || fits(0, 1) || fits(1, 0)));
};

// Beside a position they are for when there is none yet.
const checkBegin = (all) => {
	if ("last" in all && "since" in all) throw new TypeError("last and since each say where to begin; give one of them.");
};

const topicsOf = (topic, all) => {
	const { patterns, position, positions } = all;
	const topics = Array.isArray(topic) ? [...topic] : [topic];
	if (!isTexts(topics)) throw new TypeError('The topic must be a name, as "orders", or an array of names.');
	if (!topics.length && !patterns?.length)
		throw new TypeError('Name a topic, as "orders", or patterns, as [], { patterns: ["orders.*"] }.');
	if (position && (positions || topics.length !== 1))
		throw new TypeError("A position is of one topic: for several pass positions, as { orders: { epoch, offset } }.");
	checkBegin(all);
	// Only the server knows which topics a pattern brings.
	for (const name in patterns?.length ? {} : positions)
		if (positions[name] && !topics.includes(name))
			throw new TypeError(`positions name ${json(name)}, which is not subscribed: name it as a topic, or a pattern for it.`);
	return topics;
};

const WEB_URL = /^(?:(http|ws)(s?):\/\/)?(\[[\da-f:.]+\]|[^/:@?#[\]\\\s]+)(:\d{1,5})?(\/[^?#\s]*)?$/i;

// The URL that paths are put behind. With URL only where there is a page: React Native has half of one.
const baseOf = (given) => {
	let url = given?.href ?? given;
	if (isNone(url) || url === "") {
		if (!/^http/.test(home)) throw new TypeError('Name the server, as in new Clevrd("http://127.0.0.1:8080").');
		url = new URL(".", home).href;
	}
	const page = globalThis.location?.href;
	try {
		if (/^[./]/.test(url) && /^http/.test(page)) url = new URL(url, page).href;
		const [, scheme, s = "", host, port = "", path = "/"] = WEB_URL.exec(isText(url) ? url : "");
		const number = +port.slice(1);
		// A host without a port, or a scheme, would be a guess.
		if ((scheme || port) && (!port || (number > 0 && number < 65_536)))
			return new URL(`http${s.toLowerCase()}://${host}${port}${path.endsWith("/") ? path : `${path}/`}`).href;
	} catch {
		// Not one of these.
	}
	throw new TypeError("The URL must be like http://127.0.0.1:8080, 127.0.0.1:8080 or https://host, without a user and a query.");
};

const json = (value) => {
	try {
		return JSON.stringify(value);
	} catch (cause) {
		throw new TypeError(`This has no JSON form: ${cause?.message ?? cause}`, { cause });
	}
};

// A browser takes these two out of a path, however they are encoded.
const pathOf = (topic) => {
	if (isText(topic) && !/^\.\.?$/.test(topic))
		try {
			return `topics/${encodeURIComponent(topic)}`;
		} catch {
			// Half a surrogate pair.
		}
	throw new TypeError('The topic must be a name, as "orders", and not "." or "..".');
};

// The key tells a repetition. Plain http pages have no randomUUID(), React Native no crypto.
const encode = (publish) => {
	if (typeof publish.topic !== "string") throw new TypeError('The topic must be a name, as "orders".');
	const parts = new Uint32Array(4);
	globalThis.crypto?.getRandomValues(parts) ?? parts.forEach((_, at) => (parts[at] = Math.random() * 2 ** 32));
	return json(onWire({ idempotencyKey: parts.join("-"), ...publish }));
};

/** The JavaScript client of clevrd. How to use it: docs/javascript.md; the wire: docs/wire.md. */

/** Behind a message: everything up to it is accounted for. Offsets of two epochs don't compare. */
export interface Position {
	epoch: string;
	offset: number;
}

/** A message as published; `epoch` and `offset` are the position behind it. */
export interface Message<Data = unknown> extends Position {
	type: "message";
	id: string;
	topic: string;
	tenant_id: string;
	data: Data;
	/** RFC 3339, UTC, microseconds. */
	timestamp: string;
	key?: string;
}

/** Messages that are not coming; `epoch` and `offset` are the position behind it. */
export interface Gap extends Position {
	type: "gap";
	topic: string;
	/** null: nobody can know. */
	from: number | null;
	to: number | null;
	count: number | null;
	reason: "slow_consumer" | "retention" | "epoch";
}

export interface Status {
	/** `waiting`: the connection was lost, or left; the next attempt follows. */
	status: "connecting" | "open" | "waiting" | "closed";
	/** With `waiting`: the close code of the server, 1006 for none; absent when this side left. */
	code?: number;
	/** With `waiting`: why; of this side `behind`, `online`, `resume`, `timeout`. */
	reason?: string;
}

export interface Options {
	/** Whose topics; the server's default tenant if it is left out. */
	tenant?: string;
	/** How long `publish` and `publishBatch` try again. Default: 60,000. */
	retryForMs?: number;
	/** For runtimes without a WebSocket of their own. */
	WebSocket?: unknown;
}

export interface SubscribeOptions {
	/** Resume one topic behind this position; every event has one. */
	position?: Position;
	/** The same for several, by topic. Also of topics that patterns brought. */
	positions?: Record<string, Position>;
	/** Subscribe to all topics that match, those of later too: `["orders.*"]`. */
	patterns?: readonly string[];
	/** Resume by time or message id: `"90s"`, `"all"`, RFC 3339 and more. Not with `last`. */
	since?: string;
	/** Recent messages to begin with. Default: the server's, 50. */
	last?: number;
	/** What the server drops when this reader lags. Default: `"drop_oldest"`. */
	policy?: string;
	/** Messages that this reader may lag at the server. */
	buffer?: number;
	/** Characters of JSON that may wait here. Beyond them it leaves and resumes. Default: 1e6. */
	maxWaitingChars?: number;
	/** Ends the loop, quietly. */
	signal?: AbortSignal;
	onStatus?: (status: Status) => void;
	/** Other fields of the subscribe command, as docs/wire.md lists them. */
	[option: string]: unknown;
}

export interface PublishOptions {
	key?: string;
	/** By it the server knows a repetition. Default: random, one for all attempts of a call. */
	idempotencyKey?: string;
}

export interface Answer {
	success: true;
	message_id: string;
	offset: number;
	epoch: string;
	subscribers: number;
	/** Fields that the server ignored and finds misspelt; they are on the console too. */
	warnings?: readonly string[];
}

export interface Refusal {
	success: false;
	/** A sentence for people. */
	error: string;
	/** For programs. */
	code: string;
	retryable: boolean;
}

/** Many publishes ahead of their answers over one WebSocket. */
export interface PublishStream {
	/** Resolves when one more may be published. */
	readonly ready: Promise<void>;
	/** Resolves with the answer, however many connections it takes; rejects when it is refused. */
	publish(topic: string, data: unknown, options?: PublishOptions): Promise<Answer>;
	/** Closes the connection once all is answered. */
	close(): Promise<void>;
}

/** What the server, or the network, said no with; `message` is the server's sentence if it had one. */
export class ClevrdError extends Error {
	/** HTTP status, if there was an answer. */
	status?: number;
	/** Machine code of the refusal. */
	code?: string;
	/** WebSocket close code, if that was what ended it. */
	closeCode?: number;
	/** Whether the same can succeed later. */
	retryable?: boolean;
	retryAfterMs?: number;
}

export class Clevrd {
	/** `url`: the server's http or https URL. Default: the folder that this module came from. */
	constructor(url?: string | URL, options?: Options);
	/**
	 * Yields messages and gaps of one topic, or of several over one connection: of each topic in
	 * order, each once, across lost connections, until `signal` aborts or the loop is left. Throws
	 * `ClevrdError` when the server says not to come back.
	 */
	subscribe<Data = unknown>(
		topic: string | readonly string[],
		options?: SubscribeOptions,
	): AsyncGenerator<Message<Data> | Gap, void, undefined>;
	/** Publishes one message; tries again what time heals, for `retryForMs`. */
	publish(
		topic: string,
		data: unknown,
		options?: PublishOptions & { signal?: AbortSignal },
	): Promise<Answer>;
	/** Publishes many in one request; a result for each, in order. Refused ones are not repeated. */
	publishBatch(
		items: Iterable<{ topic: string; data: unknown } & PublishOptions>,
		options?: { signal?: AbortSignal },
	): Promise<(Answer | Refusal)[]>;
	/** Opens a stream of publishes, with at most `maxInFlight` (256) unanswered. */
	publishStream(options?: {
		maxInFlight?: number;
		signal?: AbortSignal;
		onStatus?: (status: Status) => void;
	}): PublishStream;
}

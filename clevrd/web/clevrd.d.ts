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
	/** For how many seconds it is worth reading; absent: for ever. */
	ttl_s?: number;
	key?: string;
	/** Its publisher's trace and attributes of a CloudEvent, where it has any and they were asked for. */
	headers?: Readonly<Record<string, string>>;
}

/** Messages that are not coming; `epoch` and `offset` are the position behind it. */
export interface Gap extends Position {
	type: "gap";
	topic: string;
	/** null: nobody can know. */
	from: number | null;
	to: number | null;
	count: number | null;
	reason: "slow_consumer" | "retention" | "epoch" | "damaged" | "expired";
}

/** What a loop over `subscribe` gets; `type` tells the two apart. */
export type Event<Data = unknown> = Message<Data> | Gap;

/** What the server drops when a reader lags. */
export type Policy = "drop_oldest" | "drop_newest" | "circuit_breaker" | "latest";

export type Status =
	| { status: "connecting" | "open" | "closed" }
	/** The connection was lost, or left; the next attempt follows. */
	| {
			status: "waiting";
			/** The close code of the server, 1006 for none; absent when this side left. */
			code?: number;
			/** Why; of this side `behind`, `online`, `resume`, `timeout`, `token`. */
			reason: string;
	  };

/** As much of a WebSocket's class as is needed: a browser's, Node's, that of the package ws. */
export type WebSocketClass = new (
	url: string,
	/** `clevrd.v1`; with a token an array of it and what presents the token. */
	protocol: any,
) => {
	readonly readyState: number;
	readonly protocol: string;
	send(data: string): void;
	close(): void;
	addEventListener(type: "open", listener: (event: any) => void): void;
	addEventListener(type: "message", listener: (event: any) => void): void;
	addEventListener(type: "close", listener: (event: any) => void): void;
	addEventListener(type: "error", listener: (event: any) => void): void;
};

export interface Options {
	/** Whose topics; the server's default tenant if it is left out, or the token's. */
	tenant?: string | undefined;
	/**
	 * An API key or a token, or a function that returns a fresh one: it is asked again before a token
	 * ends, and after a 401.
	 */
	token?: string | (() => string | Promise<string>) | undefined;
	/** How long `publish` and `publishBatch` try again; 0: not at all. Default: 60,000. */
	retryForMs?: number | undefined;
	/** For runtimes without a WebSocket of their own. */
	WebSocket?: WebSocketClass | undefined;
}

/** Options of a subscription to several topics, or by patterns. */
export interface SubscribeManyOptions {
	/** Resume each topic behind its position; every event has one. Of topics that are subscribed, or come by a pattern. */
	positions?: Readonly<Record<string, Position>> | null | undefined;
	/** Subscribe to all topics that match, those of later too: `["orders.*"]`. */
	patterns?: readonly string[] | undefined;
	/** Resume by time or message id: `"90s"`, `"all"`, RFC 3339 and more. Not with `last`. */
	since?: string | Date | undefined;
	/** Recent messages to begin with. Default: the server's, 50. Not with `since`. */
	last?: number | undefined;
	/** What the server drops when this reader lags. Default: `"drop_oldest"`. */
	policy?: Policy | undefined;
	/** Messages that this reader may lag at the server. */
	buffer?: number | undefined;
	/** The name by which others see this reader among those of its topics: 1 to 128 bytes. */
	subscriberId?: string | undefined;
	/** Whether messages have the headers that they were published with. Default: no. */
	headers?: boolean | undefined;
	/** Characters of JSON that may wait here. Beyond them it leaves and resumes. Default: 1e6. */
	maxWaitingChars?: number | undefined;
	/** Ends the loop, quietly. */
	signal?: AbortSignal | undefined;
	/** What it throws is thrown by the loop. */
	onStatus?: ((status: Status) => void) | undefined;
}

/** Options of a subscription to one topic. */
export interface SubscribeOptions extends SubscribeManyOptions {
	/** Resume the topic behind this position; any event will do. `last` and `since` count where it is not there. */
	position?: Position | null | undefined;
}

export interface PublishOptions {
	/** What the message is about, for readers that want the newest of each. */
	key?: string | undefined;
	/** By it the server knows a repetition. Default: random, one for all attempts of a call. */
	idempotencyKey?: string | undefined;
	/** For how many seconds the message is worth reading: 0.001 to 100,000,000. Default: for ever. */
	ttlS?: number | undefined;
	/** `traceparent`, `tracestate` and `ce-*`, for readers that ask for `headers`. */
	headers?: Readonly<Record<string, string>> | undefined;
}

/** One message of a batch. */
export interface Item extends PublishOptions {
	topic: string;
	/** What JSON can say, `null` excepted. */
	data: unknown;
}

export interface Answer {
	success: true;
	message_id: string;
	offset: number;
	epoch: string;
	/** How many the topic had; how many of these were behind, and how many were slow. */
	subscribers: number;
	lagging: number;
	slow: number;
	/** The message was there already, by its idempotency key. */
	repeated?: true;
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
	/**
	 * Resolves with the answer, however many connections it takes; rejects when it is refused. Who
	 * does not look at it finds the first refusal on the console.
	 */
	publish(topic: string, data: unknown, options?: PublishOptions): Promise<Answer>;
	/** Closes the connection once all is answered. */
	close(): Promise<void>;
}

/** Where a history begins, and ends. */
export interface HistoryOptions {
	/** Begin behind this position; any event will do. `last` and `since` count where it is not there. */
	position?: Position | null | undefined;
	/** The last messages alone. Not with `since`. */
	last?: number | undefined;
	/** Begin at a time, or behind a message's id: `"90s"`, RFC 3339 and more. Not with `last`. Default: `"all"`. */
	since?: string | Date | undefined;
	/** Messages at most. */
	limit?: number | undefined;
	/** Whether messages have the headers that they were published with. Default: no. */
	headers?: boolean | undefined;
	signal?: AbortSignal | undefined;
}

/** A topic that has messages; `epoch` and `offset` are the position behind the newest. */
export interface ListedTopic extends Position {
	topic: string;
	subscribers: number;
}

/** Readers of a topic that gave a `subscriberId`, in the order of these. */
export interface Presence {
	ids: readonly { id: string; connections: number }[];
	/** All, on this page or not. */
	count: number;
	/** What to pass as `after` for the page that follows. */
	next: string | null;
}

/** One topic, as the server sees it that answers. */
export interface TopicInfo extends ListedTopic {
	tenant_id: string;
	/** RFC 3339, UTC, microseconds. */
	created_at: string;
	lagging: number;
	slow: number;
	/** Of what is in memory; a journal reaches further back. */
	oldest_offset: number | null;
	held_messages: number;
	held_bytes: number;
	delivered: number;
	dropped: number;
	presence: Presence;
}

/** What the server, or the network, said no with; `message` is the server's sentence if it had one. */
export class ClevrdError extends Error {
	name: "ClevrdError";
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
	/**
	 * `url`: `http://host:port`, `host:port`, `https://host`, a path of the page's server; `ws://`
	 * and `wss://` are taken for `http://` and `https://`. Default: the folder that `/clevrd.js` came
	 * from; the npm package has none. Throws a `TypeError` when it is none of these.
	 */
	constructor(url?: string | URL, options?: Options);
	/**
	 * Yields messages and gaps of one topic, of each in order, each once, across lost connections,
	 * until `signal` aborts or the loop is left. Throws `ClevrdError` when the server says not to come
	 * back, `TypeError` for what can't be subscribed to.
	 */
	subscribe<Data = unknown>(
		topic: string,
		options?: SubscribeOptions,
	): AsyncGenerator<Event<Data>, void, undefined>;
	/** The same for several topics over one connection; between topics there is no order. */
	subscribe<Data = unknown>(
		topics: readonly string[],
		options?: SubscribeManyOptions,
	): AsyncGenerator<Event<Data>, void, undefined>;
	/** Publishes one message; tries again what time heals, for `retryForMs`. */
	publish(
		topic: string,
		data: unknown,
		options?: PublishOptions & { signal?: AbortSignal | undefined },
	): Promise<Answer>;
	/** Publishes many in one request; a result for each, in order. Refused ones are not repeated. */
	publishBatch(
		items: Iterable<Item>,
		options?: { signal?: AbortSignal | undefined },
	): Promise<(Answer | Refusal)[]>;
	/**
	 * Yields messages and gaps of what the topic has had, without a subscription, and ends behind what
	 * was the newest when it began. Throws what `publish` throws, and the reason of `signal`.
	 */
	history<Data = unknown>(
		topic: string,
		options?: HistoryOptions,
	): AsyncGenerator<Event<Data>, void, undefined>;
	/** Yields the topics that have messages and that may be subscribed to, by name. */
	topics(options?: { signal?: AbortSignal | undefined }): AsyncGenerator<ListedTopic, void, undefined>;
	/** One topic, with at most `limit` (1,000) ids of its readers, those behind `after`. */
	topic(
		topic: string,
		options?: {
			limit?: number | undefined;
			after?: string | undefined;
			signal?: AbortSignal | undefined;
		},
	): Promise<TopicInfo>;
	/** Clears a topic, and returns where its new epoch begins; it is tried once. */
	clear(topic: string, options?: { signal?: AbortSignal | undefined }): Promise<Position>;
	/** Opens a stream of publishes, with at most `maxInFlight` (256) unanswered. */
	publishStream(options?: {
		maxInFlight?: number | undefined;
		signal?: AbortSignal | undefined;
		onStatus?: ((status: Status) => void) | undefined;
	}): PublishStream;
}

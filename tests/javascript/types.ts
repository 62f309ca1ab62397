// What programs in TypeScript write, and what the types must not let them: tests/client/test_javascript_package.py.
import { WebSocket as OfPackage } from "ws";
import {
	Clevrd,
	ClevrdError,
	type Answer,
	type Event,
	type Gap,
	type HistoryOptions,
	type ListedTopic,
	type Message,
	type Policy,
	type Position,
	type PublishStream,
	type Refusal,
	type Status,
	type SubscribeOptions,
	type TopicInfo,
} from "clevrd";

interface Order {
	id: number;
}

export const client = new Clevrd("127.0.0.1:8080", { tenant: "acme", retryForMs: 0, WebSocket: OfPackage });
export const others = [
	new Clevrd(),
	new Clevrd(new URL("http://host"), { WebSocket }),
	new Clevrd("", { WebSocket: globalThis.WebSocket }),
];

export async function follow(kept: Position | null, signal?: AbortSignal): Promise<Position> {
	const onStatus = (status: Status): void => {
		if (status.status === "waiting") status.reason.trim();
		// @ts-expect-error: only what waits has a reason
		else status.reason;
	};
	const policy: Policy = "latest";
	for await (const event of client.subscribe<Order>("orders", { position: kept, policy, last: 5, signal, onStatus })) {
		if (event.type === "gap") {
			const gap: Gap = event;
			const count: number | null = event.count;
			// @ts-expect-error: a gap has no data
			event.data;
			// @ts-expect-error: nobody may know how many
			event.count.toFixed();
			// @ts-expect-error: no reason of the contract
			if (gap.reason === "bored") return gap;
			if (count === 1) return event;
		} else {
			const message: Message<Order> = event;
			event.data.id.toFixed();
			event.offset.toFixed();
			event.key?.trim();
			// @ts-expect-error: the data is an Order
			message.data.name;
			// @ts-expect-error: the key may be missing
			event.key.trim();
			return event;
		}
	}
	const events: AsyncIterator<Event> & AsyncIterable<Event> = client.subscribe(["a", "b"], {
		patterns: ["orders.*"],
		positions: { a: { epoch: "e", offset: 1 } },
		since: new Date(),
	});
	await events.return?.();
	return { epoch: "e", offset: 0 };
}

export async function publish(): Promise<void> {
	const answer: Answer = await client.publish("t", { a: 1 }, { key: "k", idempotencyKey: "1" });
	answer.repeated satisfies true | undefined;
	const results: (Answer | Refusal)[] = await client.publishBatch([{ topic: "t", data: 1, key: "k" }]);
	for (const result of results) {
		if (result.success) result.offset.toFixed();
		else result.code.trim();
		// @ts-expect-error: only a refusal has an error
		result.error;
	}
	const stream: PublishStream = client.publishStream({ maxInFlight: 5 });
	await stream.ready;
	await stream.publish("t", 1, { key: "k" });
	await stream.close();
}

export async function look(signal?: AbortSignal): Promise<Position> {
	const options: HistoryOptions = { since: new Date(), limit: 5, signal };
	for await (const event of client.history<Order>("orders", options)) {
		if (event.type === "gap") event.count?.toFixed();
		else event.ttl_s?.toFixed();
		// @ts-expect-error: a gap has no data
		event.data;
		if (event.type === "message") event.data.id.toFixed();
	}
	const names: string[] = [];
	for await (const listed of client.topics({ signal })) names.push((listed satisfies ListedTopic).topic);
	const topic: TopicInfo = await client.topic("orders", { limit: 10, after: "ann" });
	topic.presence.ids[0]?.connections.toFixed();
	// @ts-expect-error: there may be none in memory
	topic.oldest_offset.toFixed();
	await client.publish("orders", 1, { ttlS: 0.5, headers: { "ce-type": "paid" } });
	for await (const event of client.subscribe("orders", { headers: true }))
		if (event.type === "message") event.headers?.["ce-type"]?.trim();
	await client.publishBatch([{ topic: "orders", data: 1, ttlS: 60 }]);
	for await (const event of client.history("orders", { position: topic })) return event;
	return client.clear("orders", { signal });
}

export function retry(error: unknown): boolean {
	return error instanceof ClevrdError && error.retryable === true && (error.retryAfterMs ?? 0) < 9;
}

export const options: SubscribeOptions = { since: "90s", buffer: 5, maxWaitingChars: 10 };
export const recent: SubscribeOptions = { last: 5 };

// @ts-expect-error: a policy that there is not
client.subscribe("t", { policy: "drop_all" });
client.subscribe("t", { subscriberId: "ann" });
// @ts-expect-error: a number is no name
client.subscribe("t", { subscriberId: 5 });
// @ts-expect-error: text is no number
client.publish("t", 1, { ttlS: "60" });
// @ts-expect-error: misspelt
client.publish("t", 1, { ttl_s: 60 });
// @ts-expect-error: whether, not which
client.subscribe("t", { headers: { "ce-type": "paid" } });
// @ts-expect-error: which, not whether
client.publish("t", 1, { headers: true });
// @ts-expect-error: of one topic
client.history(["a", "b"]);
// @ts-expect-error: a policy is for a subscription
client.history("t", { policy: "latest" });
// @ts-expect-error: any text is no policy
client.subscribe("t", { policy: "latest" as string });
// @ts-expect-error: misspelt
client.subscribe("t", { polcy: "latest" });
// @ts-expect-error: text is no number
client.subscribe("t", { last: "5" });
// @ts-expect-error: a number is no time
client.subscribe("t", { since: 5 });
// @ts-expect-error: one pattern is no array
client.subscribe("t", { patterns: "a.*" });
// @ts-expect-error: a position is of one topic
client.subscribe(["a", "b"], { position: { epoch: "e", offset: 1 } });
// @ts-expect-error: half a position
client.subscribe("t", { position: { epoch: "e" } });
// @ts-expect-error: the controller is not its signal
client.subscribe("t", { signal: new AbortController() });
// @ts-expect-error: a topic is needed, if an empty array of them
client.subscribe();
// @ts-expect-error: no topic
client.subscribe(7);
// @ts-expect-error: no data
client.publish("t");
// @ts-expect-error: misspelt
client.publish("t", 1, { idempotency_key: "k" });
// @ts-expect-error: an item without a topic
client.publishBatch([{ data: 1 }]);
// @ts-expect-error: misspelt
client.publishStream({ maxInflight: 1 });
// @ts-expect-error: the module, not its class
new Clevrd("host:1", { WebSocket: { WebSocket } });
// @ts-expect-error: text is no number
new Clevrd("host:1", { retryForMs: "5" });
// @ts-expect-error: a number is no URL
new Clevrd(8080);

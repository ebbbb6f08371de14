import type { Timestamp } from "./gen/google/protobuf/timestamp.js";

/** The contract's form of a moment. */
export function timestamp(moment: Date): Timestamp {
  const milliseconds = moment.getTime();
  const seconds = Math.floor(milliseconds / 1000); // also before 1970, where it counts down
  return { seconds: BigInt(seconds), nanos: (milliseconds - seconds * 1000) * 1_000_000 };
}

/** A moment of the contract, cut to milliseconds. */
export function date(moment: Timestamp): Date {
  return new Date(Number(moment.seconds) * 1000 + Math.floor(moment.nanos / 1_000_000));
}

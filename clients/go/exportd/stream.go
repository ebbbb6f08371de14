package exportd

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// stallTimeout is how long a stream may be silent before another one takes over.
	stallTimeout = time.Minute
	// maxAttempts in a row that bring nothing new end a watch or a download. Their pauses
	// are 11 to 21 s in all.
	maxAttempts = 10
	minPause    = 100 * time.Millisecond
	maxPause    = 5 * time.Second
)

// errCut is what a stream ends with that stopped in the middle without an error.
var errCut = status.Error(codes.Unavailable, "the stream was cut short; try again")

// attempts counts failures in a row.
type attempts struct{ failures int }

// progress forgets the failures: something new came.
func (a *attempts) progress() { a.failures = 0 }

// pause waits before the next attempt, as long as the server asks in err, within bounds. It
// gives err back when there were enough, and the error of ctx when that ends.
func (a *attempts) pause(ctx context.Context, err error) error {
	a.failures++
	if a.failures >= maxAttempts {
		return err
	}
	asked, _ := retryDelay(err)
	timer := time.NewTimer(max(pauseAfter(a.failures), min(asked, maxPause)))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// pauseAfter doubles with each failure; up to half is left to chance, so that clients do
// not march in step.
func pauseAfter(failures int) time.Duration {
	pause := min(maxPause, minPause<<min(failures-1, 10))
	return pause - rand.N(pause/2)
}

// each opens a stream and hands its messages over until take says that it is done, or
// fails. A stream that ends before that, or is silent for longer than stall, is UNAVAILABLE.
func each[Request, Message any](
	ctx context.Context,
	open func(context.Context, *Request, ...grpc.CallOption) (grpc.ServerStreamingClient[Message], error),
	request *Request,
	stall time.Duration,
	take func(*Message) (done bool, err error),
) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silent := status.Errorf(codes.Unavailable, "the server sent nothing for %g s; try again", stall.Seconds())
	watchdog := time.AfterFunc(stall, func() { cancel(silent) })
	defer watchdog.Stop()
	stream, err := open(ctx, request)
	for {
		var message *Message
		if err == nil {
			message, err = stream.Recv()
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF):
			return errCut
		case context.Cause(ctx) == silent: // gRPC only knows that the stream was cancelled
			return silent
		default:
			return err
		}
		watchdog.Stop() // what is done with the message takes the time it takes
		if done, err := take(message); done || err != nil {
			return err
		}
		watchdog.Reset(stall)
	}
}

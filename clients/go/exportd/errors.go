package exportd

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Reason gives the reason of an error from the server: a name of the contract's
// ErrorReason without its prefix, such as "JOB_NOT_FOUND". It is empty for errors that did
// not come from exportd. The code and the message are those of [status.FromError].
func Reason(err error) string {
	s, ok := status.FromError(err)
	if !ok {
		return ""
	}
	for _, detail := range s.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.GetDomain() == "exportd" {
			return info.GetReason()
		}
	}
	return ""
}

// retryDelay is how long the server asks to wait before another try, if it does.
func retryDelay(err error) (delay time.Duration, asked bool) {
	s, _ := status.FromError(err)
	for _, detail := range s.Details() {
		if info, ok := detail.(*errdetails.RetryInfo); ok {
			return info.GetRetryDelay().AsDuration(), true
		}
	}
	return 0, false
}

// isPassing tells whether another stream may go on where one ended: it merely broke, or
// the server asks to come back later.
func isPassing(err error) bool {
	var corrupt *corruptError
	if errors.As(err, &corrupt) {
		return true
	}
	s, ok := status.FromError(err)
	if !ok {
		return false
	}
	switch s.Code() {
	case codes.Unavailable:
		return true
	case codes.Internal, codes.Unknown, codes.Canceled, codes.Aborted, codes.DeadlineExceeded:
		// Proxies and broken connections produce these. With a reason of exportd's they
		// would be an answer.
		return Reason(err) == ""
	case codes.ResourceExhausted:
		reason := Reason(err)
		_, asked := retryDelay(err)
		return reason == "" || reason == "READER_STALLED" || (reason == "QUOTA_EXCEEDED" && asked)
	default:
		return false
	}
}

// isHopeless tells whether bytes that are here can never be completed: their job is gone
// or ended without an output, they are of another output, or they are wrong.
func isHopeless(err error) bool {
	var stale *staleError
	var spoiled *spoiledError
	return errors.As(err, &stale) || errors.As(err, &spoiled) || slices.Contains([]string{
		"JOB_NOT_FOUND", "PART_NOT_FOUND", "OUTPUT_EXPIRED", "OUTPUT_DROPPED",
		"JOB_FAILED", "JOB_CANCELLED", "GENERATION_MISMATCH", "PARTS_NOT_JOINABLE",
	}, Reason(err))
}

// staleError says that the bytes that are here belong to nothing the server has now, so
// that the download must begin anew.
type staleError struct{ cause error }

func (e *staleError) Error() string { return e.cause.Error() }

// spoiledError says that all bytes are here and do not match the checksums: DATA_LOSS.
type spoiledError struct{ what string }

func (e *spoiledError) Error() string { return e.what + "; download again" }

func (e *spoiledError) GRPCStatus() *status.Status { return status.New(codes.DataLoss, e.Error()) }

// corruptError is a message of a download that is not what it should be. It may be read
// again; when that does not help it is DATA_LOSS.
type corruptError struct {
	offset int64
	what   string
}

func (e *corruptError) Error() string {
	return fmt.Sprintf("at byte %d %s; try again, and tell the operator if that does not help", e.offset, e.what)
}

func (e *corruptError) GRPCStatus() *status.Status { return status.New(codes.DataLoss, e.Error()) }

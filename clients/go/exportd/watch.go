package exportd

import (
	"context"
	"iter"
	"time"

	exportdv1 "exportd.internal/go/exportd/v1"
)

// lasted is how long a stream brings messages that is a good one, even without news.
const lasted = 10 * time.Second

// WatchOption changes what [Client.Watch] does.
type WatchOption func(*exportdv1.WatchJobRequest)

// UntilDelivered ends the watch when the job's deliveries to its sinks have ended, too.
func UntilDelivered() WatchOption {
	return func(request *exportdv1.WatchJobRequest) { request.UntilDelivered = true }
}

// Watch gives the job as it is now, at every change and every few seconds, and ends after
// the one with a final state. It rides out restarts of the server. An error, such as
// NOT_FOUND, is the last thing it gives.
//
//	for job, err := range client.Watch(ctx, jobID) { ... }
func (c *Client) Watch(ctx context.Context, jobID string, opts ...WatchOption) iter.Seq2[*exportdv1.Job, error] {
	return func(yield func(*exportdv1.Job, error) bool) {
		request := &exportdv1.WatchJobRequest{JobId: jobID}
		for _, opt := range opts {
			opt(request)
		}
		var tries attempts
		revision := int64(-1)
		for {
			opened := time.Now()
			latest := opened
			err := each(ctx, c.streams.WatchJob, request, c.stall, func(m *exportdv1.WatchJobResponse) (bool, error) {
				job := m.GetJob()
				latest = time.Now()
				// Each stream begins with the job as it stands, which is not news.
				if job.GetRevision() != revision {
					revision = job.GetRevision()
					tries.progress()
				}
				return !yield(job, nil) || hasEnded(job, request.GetUntilDelivered()), nil
			})
			if err == nil {
				return
			}
			if latest.Sub(opened) >= lasted {
				tries.progress()
			}
			if ctx.Err() != nil {
				err = ctx.Err()
			} else if isPassing(err) {
				err = tries.pause(ctx, err)
			}
			if err != nil {
				yield(nil, err)
				return
			}
		}
	}
}

func hasEnded(job *exportdv1.Job, delivered bool) bool {
	if delivered && job.GetDeliveryStatus() == exportdv1.DeliveryStatus_DELIVERY_STATUS_PENDING {
		return false
	}
	return isFinal(job.GetState())
}

func isFinal(state exportdv1.JobState) bool {
	switch state {
	case exportdv1.JobState_JOB_STATE_SUCCEEDED, exportdv1.JobState_JOB_STATE_FAILED, exportdv1.JobState_JOB_STATE_CANCELLED:
		return true
	default:
		return false
	}
}
